"""The paper's toy model: four prompts, ten answers, a small network, and exact optima (2406.07327, section 3.1).

Answer i is the right one for prompt i (i < 4); one of the answers 4 to 7, drawn anew per seed, is its rejected one; 8 and
9 are in no pair. Four scenarios say whether the chosen and the rejected answers are likely (on-policy) at the start.
All seeds and scenarios of a method are trained at once: their parameters are stacked in a leading dimension.

Shapes: r runs (scenario by seed), p prompts, k answers, t steps.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tenfold_shared.errors import UserError
from torch import Tensor

from dpo3d.losses import LOSSES, PairLogps, preference_loss
from dpo3d.theory import grad_wrt_likelihood

PROMPTS, ANSWERS = 4, 10
SCENARIOS: dict[int, tuple[float, float, float, float]] = {
    1: (0.12, 0.12, 0.03, 0.01),
    2: (0.02, 0.12, 0.40, 0.04),
    3: (0.12, 0.02, 0.40, 0.04),
    4: (0.02, 0.02, 0.80, 0.04),
}
"""Starting probability of each chosen answer, each rejected answer, answer 8 and answer 9 (the paper's heat-maps)."""

Activation = Literal["relu", "gelu", "tanh"]
Optimizer = Literal["adam", "sgd"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Method:
    """A way to train: a registered pair loss with its options, or one of the routes through the reward."""

    loss: str
    options: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "dpo": Method("sigmoid"),
    "flex.08": Method("flex", {"beta_rejected": 0.08}),
    "flex.05": Method("flex", {"beta_rejected": 0.05}),
    "flex.02": Method("flex", {"beta_rejected": 0.02}),
    "flex.01": Method("flex", {"beta_rejected": 0.01}),
    "sft.1": Method("sigmoid", {"gamma": 0.1}),
    "dpop": Method("dpop"),
    "cal_dpo": Method("cal_dpo"),
    "ipo": Method("ipo_sum"),
    "hinge": Method("hinge"),
    "slic": Method("slic"),
    "simpo": Method("simpo", {"beta": 2.0, "simpo_margin": 1.0}),
    "orpo": Method("orpo"),
    "nca": Method("nca_pair"),
    "sppo": Method("sppo_hard"),
    "apo": Method("apo_zero"),
    "band": Method("band"),
    "onpolicy-dpo": Method("onpolicy-dpo"),
    "policy-gradient": Method("policy-gradient"),
    "reinforce": Method("reinforce"),
}
"""The named settings; any registered loss is a method under its own name too."""
REWARD_ROUTES = ("onpolicy-dpo", "policy-gradient", "reinforce")


@dataclass(frozen=True)
class Settings:
    """How the toy is trained; the defaults are the ones its figures are quoted at."""

    width: int = 64
    activation: Activation = "relu"
    optimizer: Optimizer = "adam"
    learning_rate: float = 1e-3
    steps: int = 600
    sft_steps: int = 600
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation is '{self.activation}', expected one of {', '.join(ACTIVATIONS)}")
        if self.optimizer not in ("adam", "sgd"):
            raise UserError(f"optimizer is '{self.optimizer}', expected adam or sgd")
        for name in ("width", "learning_rate", "steps", "sft_steps", "beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}, expected more than 0")


@dataclass(frozen=True)
class World:
    """The stacked runs at the end of supervised training: where every method starts."""

    settings: Settings
    scenarios: Tensor
    """`(r,)`."""
    seeds: Tensor
    """`(r,)`."""
    rejected: Tensor
    """`(r, p)`: the rejected answer of each prompt."""
    parameters: list[Tensor]
    reference: Tensor
    """log π0, `(r, p, k)`."""

    @property
    def chosen(self) -> Tensor:
        """`(r, p)`: prompt i's right answer is i."""
        return torch.arange(PROMPTS).expand(len(self.seeds), PROMPTS)

    @property
    def reward(self) -> Tensor:
        """1 for the right answer, else 0, `(p, k)`."""
        return torch.eye(PROMPTS, ANSWERS)

    def optimum(self) -> Tensor:
        """log π* ∝ log π0 + r/β, the exact solution of KL-regularised reward maximisation, `(r, p, k)`."""
        return (self.reference.double() + self.reward.double() / self.settings.beta).log_softmax(-1)


@dataclass(frozen=True)
class Run:
    """One method's trajectory over all runs. Likelihoods are means over the prompts, in log space."""

    method: str
    world: World
    logps: Tensor
    """`(t + 1, r, p, k)`: every log-probability at every step."""

    def of(self, answers: Tensor) -> Tensor:
        """log π of one answer per prompt, `(t + 1, r, p)`."""
        return self.logps.gather(-1, answers.expand(len(self.logps), -1, -1).unsqueeze(-1)).squeeze(-1)

    @property
    def chosen(self) -> Tensor:
        """log π+, `(t + 1, r, p)`."""
        return self.of(self.world.chosen)

    @property
    def rejected(self) -> Tensor:
        """log π−, `(t + 1, r, p)`."""
        return self.of(self.world.rejected)

    @property
    def off_pair(self) -> Tensor:
        """Mass outside each prompt's pair, 1 − π+ − π−, `(t + 1, r, p)`: a sum over the other eight, by a mask."""
        mask = torch.ones(len(self.world.seeds), PROMPTS, ANSWERS, dtype=torch.bool)
        mask.scatter_(-1, self.world.chosen.unsqueeze(-1), False).scatter_(-1, self.world.rejected.unsqueeze(-1), False)
        return self.logps.masked_fill(~mask, -math.inf).logsumexp(-1).exp()

    @property
    def others_chosen(self) -> Tensor:
        """Mass on other prompts' chosen answers, `(t + 1, r, p)`: where the lost mass goes."""
        mask = torch.eye(PROMPTS, ANSWERS, dtype=torch.bool)
        mask[:, PROMPTS:] = True
        return self.logps.masked_fill(mask, -math.inf).logsumexp(-1).exp()

    def gradients(self, *, beta_rejected: float | None = None, gamma: float = 0.0) -> tuple[Tensor, Tensor]:
        """log |∂ℓ/∂π+| and log |∂ℓ/∂π−| along the way, `(t + 1, r, p)` each."""
        start = [self.chosen[0].expand_as(self.chosen), self.rejected[0].expand_as(self.chosen)]
        flat = PairLogps(*(x.flatten() for x in (self.chosen, self.rejected, *start)))
        found = grad_wrt_likelihood(flat, beta=self.world.settings.beta, beta_rejected=beta_rejected, gamma=gamma)
        return found.log_chosen.view_as(self.chosen), found.log_rejected.view_as(self.chosen)

    def scenario(self, scenario: int) -> Tensor:
        """Indices of that scenario's runs, `(seeds,)`."""
        return (self.world.scenarios == scenario).nonzero().flatten()


def _forward(parameters: list[Tensor], activation: str) -> Tensor:
    """log π of all prompts, `(r, p, k)`; the input is one-hot, so the first layer is its own output."""
    w1, b1, w2, b2, w3, b3 = parameters
    hidden = ACTIVATIONS[activation](w1 + b1)
    hidden = ACTIVATIONS[activation](torch.baddbmm(b2, hidden, w2))
    return torch.baddbmm(b3, hidden, w3).log_softmax(-1)


def _initial(seeds: Tensor, width: int) -> list[Tensor]:
    """PyTorch's own initialisation of three linear layers, drawn from each run's seed."""
    sizes = [(PROMPTS, width), (width, width), (width, ANSWERS)]
    stacks: list[list[Tensor]] = [[] for _ in range(6)]
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        for i, (fan_in, fan_out) in enumerate(sizes):
            bound = 1 / math.sqrt(fan_in)
            stacks[2 * i].append((2 * torch.rand(fan_in, fan_out, generator=generator) - 1) * bound)
            stacks[2 * i + 1].append((2 * torch.rand(1, fan_out, generator=generator) - 1) * bound)
    return [torch.stack(s) for s in stacks]


def _targets(scenarios: Tensor) -> Tensor:
    """The table of starting probabilities, `(r, 1, k)`."""
    rows = []
    for scenario in scenarios.tolist():
        chosen, rejected, eighth, ninth = SCENARIOS[scenario]
        row = torch.tensor([chosen] * 4 + [rejected] * 4 + [eighth, ninth])
        rows.append(row / row.sum())
    return torch.stack(rows).unsqueeze(1)


def pretrain(scenarios: list[int], seeds: list[int], settings: Settings | None = None) -> World:
    """Fit every run's network to its scenario's table. Raises UserError for a scenario that is not 1 to 4."""
    settings = settings or Settings()
    if not scenarios or not seeds:
        raise UserError("no scenario or no seed given", hint="pass --scenario 1 and --seeds 4")
    if unknown := [s for s in scenarios if s not in SCENARIOS]:
        raise UserError(f"scenario {unknown[0]} does not exist", hint="the scenarios are 1, 2, 3 and 4")
    runs = [(scenario, seed) for scenario in scenarios for seed in seeds]
    scenario_r, seed_r = (torch.tensor(column) for column in zip(*runs, strict=True))
    rejected = torch.stack(
        [PROMPTS + torch.randperm(PROMPTS, generator=torch.Generator().manual_seed(seed + 1)) for _, seed in runs]
    )
    parameters = [p.requires_grad_() for p in _initial(seed_r, settings.width)]
    target = _targets(scenario_r)
    optimizer = torch.optim.Adam(parameters, lr=1e-3, foreach=True)
    for step in range(settings.sft_steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / settings.sft_steps)
        loss = -(target * _forward(parameters, settings.activation)).sum(-1).mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        reference = _forward(parameters, settings.activation)
    return World(settings, scenario_r, seed_r, rejected, [p.detach() for p in parameters], reference)


def method_of(name: str) -> Method:
    """The method of that name. Raises UserError naming them all."""
    if name in METHODS:
        return METHODS[name]
    if name in LOSSES:
        return Method(name)
    known = ", ".join([*METHODS, *sorted(set(LOSSES) - set(METHODS))])
    raise UserError(f"no method named '{name}'", hint=f"there are {known}")


def train(world: World, name: str, settings: Settings | None = None) -> Run:
    """Train every run of `world` by one method; `settings` where they differ from the world's own (not its network)."""
    settings, method = settings or world.settings, method_of(name)
    parameters = [p.clone().requires_grad_() for p in world.parameters]
    make = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    optimizer = make(parameters, lr=settings.learning_rate, foreach=True)
    generator = torch.Generator().manual_seed(int(world.seeds.sum()))
    path = torch.empty(settings.steps + 1, *world.reference.shape)
    for step in range(settings.steps + 1):
        logps = _forward(parameters, settings.activation)
        path[step] = logps.detach()
        if step == settings.steps:
            break
        if method.loss == "band":
            per_run = _banded(world, logps, parameters, settings.beta)
        else:
            per_run = _loss(method, world, logps, settings.beta, generator)
        optimizer.zero_grad()
        # The runs share no parameter: the gradient of the sum is each run's own gradient.
        per_run.sum().backward()
        optimizer.step()
    return Run(name, world, path)


def _loss(method: Method, world: World, logps: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """The objective of each run, `(r,)`, a mean over its prompts."""
    if method.loss == "policy-gradient":
        # KL-regularised expected reward, in closed form over the ten answers.
        probabilities = logps.exp()
        return (probabilities * (beta * (logps - world.reference) - world.reward)).sum(-1).mean(-1)
    if method.loss == "reinforce":
        return _reinforce(world, logps, beta, generator)
    if method.loss == "onpolicy-dpo":
        return _onpolicy_dpo(world, logps, beta, generator)
    return _pair_loss(method, logps, world.reference, world.chosen, world.rejected, beta).mean(-1)


def _pair_loss(
    method: Method, logps: Tensor, reference: Tensor, chosen: Tensor, rejected: Tensor, beta: float
) -> Tensor:
    """The registered loss of one pair per prompt, `(r, p)`."""

    def of(table: Tensor, answers: Tensor) -> Tensor:
        return table.gather(-1, answers.unsqueeze(-1)).flatten()

    one = torch.ones(chosen.numel())
    pair = PairLogps(of(logps, chosen), of(logps, rejected), of(reference, chosen), of(reference, rejected), one, one)
    out = preference_loss(method.loss, pair, **{"beta": beta, **method.options})
    return out.loss.view(chosen.shape)


def _banded(world: World, logps: Tensor, parameters: list[Tensor], beta: float, safety: float = 0.5) -> Tensor:
    """Flex-DPO whose β− keeps β+/β− inside the first-order band at this very step, `(r,)`: a diagnostic made a method.

    With g± the gradients of the prompts' mean log π±, β− is at most `safety` times β+ ‖g+‖² / ⟨g+, g−⟩.
    """
    pairs = [
        (table.gather(-1, a.unsqueeze(-1)).squeeze(-1))
        for table in (logps, world.reference)
        for a in (world.chosen, world.rejected)
    ]
    plus, minus = (torch.autograd.grad(half.mean(-1).sum(), parameters, retain_graph=True) for half in pairs[:2])
    own, across = (sum((a * b).flatten(1).sum(1) for a, b in zip(plus, g, strict=True)) for g in (plus, minus))
    limit = torch.where(across > 0, safety * beta * own / across.clamp(min=1e-30), math.inf)
    z = PairLogps(*pairs).margin(beta, limit.clamp(max=beta).unsqueeze(-1))
    return -F.logsigmoid(z).mean(-1)


def _sample(logps: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n answers per prompt, `(r, p, n)`."""
    flat = logps.detach().exp().flatten(0, 1)
    return torch.multinomial(flat, n, replacement=True, generator=generator).view(*logps.shape[:2], n)


def _reinforce(world: World, logps: Tensor, beta: float, generator: torch.Generator, n: int = 8) -> Tensor:
    """Leave-one-out policy gradient from n samples of the reward with the KL penalty inside, `(r,)`."""
    answers = _sample(logps, n, generator)
    picked = logps.gather(-1, answers)
    reward = world.reward.expand_as(logps).gather(-1, answers)
    score = reward - beta * (picked.detach() - world.reference.gather(-1, answers))
    advantage = (score - score.mean(-1, keepdim=True)) * n / (n - 1)
    return -(advantage * picked).mean(-1).mean(-1)


def _onpolicy_dpo(world: World, logps: Tensor, beta: float, generator: torch.Generator, n: int = 8) -> Tensor:
    """DPO on pairs drawn from the present policy at every step, right answer against a wrong one, `(r,)`.

    Prompts whose n samples are all right or all wrong give no pair.
    """
    answers = _sample(logps, n, generator)
    right = answers == torch.arange(PROMPTS).view(1, PROMPTS, 1)
    paired = right.any(-1) & ~right.all(-1)
    wrong = answers.gather(-1, (~right).float().argmax(-1, keepdim=True)).squeeze(-1)
    loss = _pair_loss(Method("sigmoid"), logps, world.reference, world.chosen, wrong, beta)
    return torch.where(paired, loss, torch.zeros_like(loss)).mean(-1)


@dataclass(frozen=True)
class Outcome:
    """One method in one scenario: means over the seeds (and prompts)."""

    method: str
    scenario: int
    chosen: float
    """π+ at the end."""
    chosen_std: float
    """Over the seeds."""
    peak: float
    """The largest mean π+ on the way."""
    peak_step: int
    log10_rejected: float
    off_pair: float
    others_chosen: float
    """Mass on other prompts' chosen answers."""


def outcomes(run: Run) -> list[Outcome]:
    """The figures of one run, scenario by scenario."""
    found = []
    for scenario in sorted(set(run.world.scenarios.tolist())):
        rows = run.scenario(scenario)
        chosen = run.chosen[:, rows].exp().mean(-1)
        mean = chosen.mean(-1)
        found.append(
            Outcome(
                run.method,
                scenario,
                float(mean[-1]),
                float(chosen[-1].std()) if len(rows) > 1 else 0.0,
                float(mean.max()),
                int(mean.argmax()),
                float(run.rejected[-1, rows].mean()) / math.log(10),
                float(run.off_pair[-1, rows].mean()),
                float(run.others_chosen[-1, rows].mean()),
            )
        )
    return found


def not_reproduced(found: list[Outcome]) -> list[str]:
    """What the paper's figure 2 says of DPO and these outcomes do not, in sentences with both figures."""
    text = (files("dpo3d") / "data" / "paper_tables.json").read_text(encoding="utf-8")
    paper = json.loads(text)["toy"]
    dpo = {outcome.scenario: outcome for outcome in found if outcome.method == "dpo"}
    notes = []
    if len(dpo) > 1:
        best = max(dpo.values(), key=lambda outcome: outcome.chosen)
        if best.scenario != 1 and 1 in dpo:
            notes.append(
                f"Not reproduced: the paper has S1 best; here S{best.scenario} is ({best.chosen:.2f}, S1 {dpo[1].chosen:.2f})."
            )
        for better, worse in ((1, 3), (2, 4)):
            if better in dpo and worse in dpo:
                holds = "Reproduced" if dpo[better].chosen > dpo[worse].chosen else "Not reproduced"
                notes.append(
                    f"{holds}: an on-policy rejected answer is better with the chosen held fixed, "
                    f"S{better} {dpo[better].chosen:.2f} against S{worse} {dpo[worse].chosen:.2f}."
                )
    for scenario, outcome in dpo.items():
        peak, final = (paper[key][str(scenario)] for key in ("peak", "final"))
        notes.append(
            f"S{scenario}: π+ peaks at {outcome.peak:.2f} and ends at {outcome.chosen:.2f}; "
            f"the paper's curve, by eye, at {peak:.2f} and {final:.2f}."
        )
    flex = {o.scenario: o for o in found if o.method == "flex.02"}
    if 1 in flex and 1 in dpo and flex[1].log10_rejected < dpo[1].log10_rejected:
        notes.append(
            "Not reproduced: Flex-DPO does not tame the rejected answer's drop, it deepens it "
            f"(S1, log10 π− {flex[1].log10_rejected:.0f} against {dpo[1].log10_rejected:.0f}); "
            "it helps because the chosen answer keeps a live gradient."
        )
    return notes
