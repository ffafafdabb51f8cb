from itertools import pairwise

import numpy as np
import pytest
from smartspec import (
    AcceptLengthEMA,
    BatchSizeTable,
    BatchState,
    DisableByBatchSize,
    FixedLength,
    Hardware,
    NoSpeculation,
    Oracle,
    StepOutcome,
    recommend_table,
)
from tenfold_shared.errors import UserError


def state(n, **kwargs):
    return BatchState(list(range(n)), np.full(n, 50), **kwargs)


def length(policy, n, **kwargs):
    return policy.decide(state(n, **kwargs)).draft_len


def test_the_stock_rules():
    assert length(NoSpeculation(), 3) == 0 and length(FixedLength(4), 3) == 4
    rule = DisableByBatchSize(5, 16)
    assert [length(rule, n) for n in (1, 16, 17)] == [5, 5, 0]
    table = BatchSizeTable([[17, 64, 1], [1, 16, 4]])
    assert [length(table, n) for n in (1, 16, 17, 64, 65)] == [4, 4, 1, 1, 1]


def test_limits_hold_for_every_rule():
    assert length(FixedLength(4), 2, caps=np.array([1, 2])) == 2
    assert length(FixedLength(4), 2, max_draft_len=1) == 1
    assert length(FixedLength(4), 2, free_tokens=4) == 1


def outcome(n, kept, k):
    return StepOutcome(list(range(n)), np.full(n, k), np.full(n, kept), n, 1.0, draft_len=k)


def test_the_accept_length_rule_climbs_and_falls():
    rule = AcceptLengthEMA({1: (1, 3, 7)})
    for _ in range(60):
        rule.observe(outcome(1, 0, length(rule, 1)))
    assert length(rule, 1) == 1
    for _ in range(120):
        k = length(rule, 1)
        rule.observe(outcome(1, k, k))
    assert length(rule, 1) == 7


def test_the_accept_length_rule_leaves_zero_again_and_is_off_at_64():
    rule = AcceptLengthEMA()
    seen = set()
    for _ in range(200):
        seen.add(length(rule, 32))
        rule.observe(outcome(32, 0, length(rule, 32)))
    assert seen == {0, 1}
    assert length(rule, 64) == 0


def test_the_oracle_knows_and_needs_the_truth():
    oracle = Oracle(Hardware.preset("a100-7b-160m").cost())
    assert length(oracle, 1, true_acceptance=np.array([0.95])) > 3
    assert length(oracle, 1, true_acceptance=np.array([0.0])) == 0
    with pytest.raises(UserError, match="simulator"):
        length(oracle, 1)


def test_the_recommended_table_covers_every_size_and_falls():
    rows = recommend_table(Hardware.preset("a100-7b-160m").cost(), 0.8, max_num_seqs=128)
    assert rows[0][0] == 1 and rows[-1][1] == 128
    assert all(a[1] + 1 == b[0] and a[2] != b[2] for a, b in pairwise(rows))
    assert rows[0][2] > rows[-1][2]
    BatchSizeTable(rows)


def test_errors():
    with pytest.raises(UserError, match="draft_len is -1"):
        FixedLength(-1)
    with pytest.raises(UserError, match="overlap"):
        BatchSizeTable([[1, 4, 2], [4, 8, 1]])
    with pytest.raises(UserError, match="rows of"):
        BatchSizeTable([[4, 1, 2]])
    with pytest.raises(UserError, match="acceptance"):
        recommend_table(Hardware.preset("a100-7b-160m").cost(), 1.2)
