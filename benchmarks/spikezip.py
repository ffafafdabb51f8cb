"""What SpikeZIP-TF claims, measured: exactness, accuracy over time, cost, speed, against spikingjelly's own converters.

make bench-spikezip
"""

import sys
from pathlib import Path

# The script has its package's name, and its folder comes first on the path.
sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import copy  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import logging  # noqa: E402
import shutil  # noqa: E402
import statistics  # noqa: E402
import warnings  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from spikezip import QATTrainer, QuantConfig, calibrate, compare, convert, load_quantized, quantize, save, testbed  # noqa: E402
from spikezip import engine as engine_module  # noqa: E402
from spikezip.encoders import checked  # noqa: E402
from spikezip.energy import measure  # noqa: E402
from spikezip.engine import integers  # noqa: E402
from spikezip.functional import stbif_plus_multi_step  # noqa: E402
from spikingjelly.activation_based import functional as sj  # noqa: E402
from spikingjelly.activation_based.ann2snn import Converter, ModuleConverter, SpikeZIPTFQANNRecipe, STATransformerRecipe  # noqa: E402
from spikingjelly.activation_based.neuron import STBIFNode  # noqa: E402
from tenfold_shared.claims import Claim, folder_digest, run_benchmark, spread  # noqa: E402
from tenfold_shared.figures import OURS, PEERS, style  # noqa: E402
from tenfold_shared.figures import save as save_figure  # noqa: E402
from tenfold_shared.help_time import help_time  # noqa: E402
from tenfold_shared.timing import compare as time_both  # noqa: E402
from torch import Tensor, nn  # noqa: E402

PAPER = "2406.03470"
LEVELS = (8, 16, 32)
SHOWN = 120
RECIPE, STA = "spikingjelly SpikeZIP recipe", "spikingjelly STA recipe"
RESULTS = Path(__file__).resolve().parent / "results"
ANN_EPOCHS, QAT_EPOCHS = 24, 6
SENTENCES, TEXT_EPOCHS, TEXT_QAT_EPOCHS = 8000, 7, 1
VIEWER_EPOCHS = 20
# More threads wait for each other at matrices this small.
torch.set_num_threads(1)
logging.getLogger("accelerate").setLevel(logging.ERROR)


def claim(id: str, statement: str, metric: str, values: list[float], bar: str, passed: bool | None, seeds: list[int],
          peers: dict[str, Any] | None = None, **kwargs: Any) -> Claim:  # fmt: skip
    means = {name: statistics.fmean(v) if isinstance(v, list) else v for name, v in (peers or {}).items()}
    return Claim(id, PAPER, statement, metric, statistics.fmean(values), means, bar, passed, seeds,
                 spread=spread(values), **kwargs)  # fmt: skip


# Trained networks are kept beside the finished measurements, so that one function can be measured again alone. They
# follow from the sources of quantiser, training and testbed; --fresh trains them again.


@functools.cache
def _cache(name: str, *settings: float) -> Path:
    digest = hashlib.sha256(folder_digest(Path(testbed.__file__).parent / "qann").encode())
    digest.update(Path(testbed.__file__).read_bytes() + repr(settings).encode())
    folder = RESULTS / ".partial" / "spikezip" / f"{name}-{digest.hexdigest()[:16]}"
    if "--fresh" in sys.argv:
        shutil.rmtree(folder, ignore_errors=True)
    return folder


@functools.cache
def vision(seed: int) -> tuple[testbed.Digits, nn.Module, dict[int, nn.Module], dict[int, float]]:
    """Digits, the ANN, the QANN by levels, and its accuracy after calibration alone."""
    data, ann = testbed.digits(seed), testbed.digits_vit(seed)
    folder = _cache(f"vision-{seed}", ANN_EPOCHS, QAT_EPOCHS)
    if (folder / "ann.pt").exists():
        ann.load_state_dict(torch.load(folder / "ann.pt", weights_only=True))
        calibrated = torch.load(folder / "calibrated.pt", weights_only=True)
        return data, ann.eval(), {n: load_quantized(folder / str(n)) for n in LEVELS}, calibrated
    testbed.train(ann, data.loader(seed=seed), epochs=ANN_EPOCHS, augment=testbed.roll, seed=seed)
    qanns, calibrated = {}, {}
    for n in LEVELS:
        qann = quantize(ann, QuantConfig(levels=n))
        calibrate(qann, [data.train[:512]], method="mse")
        calibrated[n] = testbed.accuracy(qann, data.test, data.test_labels)
        trainer = QATTrainer(qann, ann, loss="kl", lr=1e-3, augment=testbed.roll, seed=seed, device="cpu")
        qanns[n] = trainer.fit(data.loader(seed=seed), QAT_EPOCHS)
        save(qanns[n], folder / str(n))
    torch.save(calibrated, folder / "calibrated.pt")
    torch.save(ann.state_dict(), folder / "ann.pt")
    return data, ann, qanns, calibrated


@functools.cache
def language(seed: int) -> tuple[testbed.Sentiment, nn.Module, dict[int, nn.Module]]:
    data = testbed.sentiment(seed, train=SENTENCES)
    ann, folder = (
        testbed.sentiment_roberta(data.vocabulary, seed),
        _cache(f"language-{seed}", SENTENCES, TEXT_EPOCHS, TEXT_QAT_EPOCHS),
    )
    if (folder / "ann.pt").exists():
        ann.load_state_dict(torch.load(folder / "ann.pt", weights_only=True))
        return data, ann.eval(), {n: load_quantized(folder / str(n)) for n in LEVELS}
    testbed.train(ann, data.loader(seed=seed), epochs=TEXT_EPOCHS, lr=2e-3, seed=seed)
    qanns = {}
    for n in LEVELS:
        qann = quantize(ann, QuantConfig(levels=n))
        calibrate(qann, [{k: v[:512] for k, v in data.train.items()}], method="mse")
        qanns[n] = QATTrainer(qann, ann, loss="kl", lr=2e-3, seed=seed, device="cpu").fit(
            data.loader(seed=seed), TEXT_QAT_EPOCHS
        )
        save(qanns[n], folder / str(n))
    torch.save(ann.state_dict(), folder / "ann.pt")
    return data, ann, qanns


def random_deep_vit(seed: int) -> tuple[nn.Module, Tensor]:
    """A random ViT of depth 12 at 32 levels, with weights large enough that its blocks matter."""
    model = testbed.digits_vit(seed, depth=12)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "blocks" in name:
            nn.init.normal_(parameter, std=0.15)
    x = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    qann = quantize(model.eval(), QuantConfig(levels=32))
    calibrate(qann, [x[:12]], method="lsq")
    return qann, x


def right(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).float().mean())


def exactness(seeds: list[int]) -> list[Claim]:
    drive, doubles, resync, naive, library, library_deep = [], [], [], [], [], []
    bitwise, neurons, states, errors, peer_errors = True, 0, 0, [], []
    for seed in seeds:
        data, _, qanns, _ = vision(seed)
        deep, deep_x = random_deep_vit(seed)
        totals = [0, 0, 0]
        for qann, inputs in [*((qanns[n], data.test[:30]) for n in LEVELS), (deep, deep_x)]:
            found = compare(convert(qann), inputs, max_steps=400)
            totals[0] += found.mismatches
            neurons += found.neurons
            small = inputs[:12]
            double = compare(convert(qann, engine="event", dtype=torch.float64, resync=False), small, max_steps=400)
            totals[1] += double.mismatches
            mended = compare(convert(qann, engine="event"), small, max_steps=400)
            totals[2] += mended.mismatches
            bitwise &= found.bitwise and mended.bitwise
        for values, total in zip((drive, doubles, resync), totals, strict=True):
            values.append(float(total))
        untouched = compare(convert(deep, engine="event", resync=False), deep_x, max_steps=400)
        naive.append(float(untouched.mismatches))
        states += untouched.neurons
        errors.append(untouched.error)
        wrong = [_rival_mismatches(qanns[n], data.test[:30], 64) for n in LEVELS]
        on_deep = _rival_mismatches(deep, deep_x, 64)
        library_deep.append(float(on_deep[0]))
        library.append(float(sum(count for count, _ in wrong) + on_deep[0]))
        peer_errors += [error for _, error in (*wrong, on_deep)]
    peer = f"{RECIPE}, 64 steps"
    return [
        claim("drive-float32", "Drive engine, float32: logits bitwise equal to the quantised network, every integer equal "
              "(digits ViT at 8, 16, 32 levels, random ViT of depth 12)",
              "neurons whose integer differs", drive, "0, and logits bitwise equal", not sum(drive) and bitwise, seeds,
              {peer: library},
              note=f"{neurons} neurons compared; the recipe's logits on the same images are off by up to "
              f"{max(peer_errors):.2g}", headline=True),
        claim("event-float64", "Event engine, float64: every integer equal (the same four networks)",
              "neurons whose integer differs", doubles, "0", not sum(doubles), seeds),
        claim("event-resync", "Event engine, float32 with resync: every integer equal, logits bitwise equal",
              "neurons whose integer differs", resync, "0", not sum(resync) and bitwise, seeds),
        claim("event-naive", "Event engine, float32 without resync, random ViT of depth 12, 48 images: rounding flips integers",
              "neurons whose integer differs", naive, "more than 0 for every seed", min(naive) > 0, seeds,
              {peer: library_deep, "drive engine, same images": 0.0 if not sum(drive) else sum(drive)},
              note=f"{states // len(seeds)} neurons a seed; logits off by up to {max(errors):.2g}"),
    ]  # fmt: skip


RIVAL_NAMES = {
    "quan_q": "q_if", "quan_k": "k_if", "quan_v": "v_if", "attn_quan": "attn_if", "after_attn_quan": "after_attn_if",
    "quan_proj": "proj_if",
}  # fmt: skip


def _rival_mismatches(qann: nn.Module, x: Tensor, steps: int) -> tuple[int, float]:
    """Integers of spikingjelly's SpikeZIP recipe that differ from the QANN's after `steps` steps, and its logit error."""
    snn = _rival_of(qann, steps)
    logits = _run_rival(snn, x, steps, "s")[-1]
    nodes = {name: module for name, module in snn.named_modules() if isinstance(module, STBIFNode)}
    wrong = 0
    for name, (wanted,) in integers(qann, checked(x, x.device, x.dtype)).items():
        stem, _, last = name.rpartition(".")
        node = nodes[f"{stem}.{RIVAL_NAMES[last]}" if last in RIVAL_NAMES else name]
        wrong += int((node.acc_q.reshape(wanted.shape) != wanted).sum())
    return wrong, float((logits - qann(x).detach()).abs().max())


def families(seeds: list[int]) -> list[Claim]:
    """Stock models of the libraries, tiny and random."""
    import torchvision
    import transformers
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
             "initializer_range": 0.15}  # fmt: skip
    exact, events, accepted = [], [], []
    for seed in seeds:
        torch.manual_seed(seed)
        image, colour = torch.randn(3, 1, 8, 8), torch.randn(3, 3, 16, 16)
        text = {
            "input_ids": torch.randint(3, 40, (3, 9)),
            "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4] * 2)[:3],
        }
        pixels = {"pixel_values": image}
        vision_sizes = {**sizes, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        small = {
            "img_size": 8,
            "patch_size": 2,
            "in_chans": 1,
            "num_classes": 10,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
        }
        words = {**sizes, "vocab_size": 48, "pad_token_id": 1}
        distil = {"vocab_size": 48, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "initializer_range": 0.15}
        viewer = torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=10)
        nn.init.normal_(viewer.heads.head.weight)
        models: dict[str, tuple[nn.Module, Any]] = {
            "timm ViT": (testbed.digits_vit(seed, act=nn.GELU), image),
            "timm DeiT": (VisionTransformerDistilled(**small), image),
            "torchvision ViT": (viewer, colour),
            "transformers ViT": (
                transformers.ViTForImageClassification(transformers.ViTConfig(**vision_sizes)),
                pixels,
            ),
            "BERT": (transformers.BertForSequenceClassification(transformers.BertConfig(**words)), text),
            "RoBERTa": (transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**words)), text),
            "DistilBERT": (
                transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**distil)),
                text,
            ),
        }
        data, text_data = testbed.digits(seed), testbed.sentiment(seed, train=256, test=1)
        good = event = taken = 0
        for model, inputs in models.values():
            for trained in (False, True):
                if trained:
                    _teach(model, inputs, data, text_data, seed)
                for n in LEVELS:
                    qann = quantize(model, QuantConfig(levels=n))
                    calibrate(qann, [inputs], method="mse")
                    found = compare(convert(qann), inputs, max_steps=400)
                    good += found.bitwise and not found.mismatches
                    if trained and n == 16:
                        double = convert(qann, engine="event", dtype=torch.float64, resync=False)
                        event += not compare(double, inputs, max_steps=400).mismatches
                        mended = compare(convert(qann, engine="event"), inputs, max_steps=400)
                        event += mended.bitwise and not mended.mismatches
            try:
                rival = ModuleConverter(SpikeZIPTFQANNRecipe(64, "vit" if inputs is not text else "roberta"))
                taken += any(isinstance(m, STBIFNode) for m in rival.convert(model.eval()).modules())
            except (ValueError, TypeError, AttributeError, RuntimeError):
                pass
        exact.append(100 * good / (2 * 3 * len(models)))
        events.append(100 * event / (2 * len(models)))
        accepted.append(100 * taken / len(models))
    kinds = "timm ViT and DeiT, torchvision ViT, transformers ViT, BERT, RoBERTa and DistilBERT, random and after 16 steps of training"
    return [
        claim("families", f"Stock models convert exactly at 8, 16 and 32 levels, drive engine, float32: {kinds}",
              "conversions that are bitwise exact, %", exact, "100 %", min(exact) == 100, seeds,
              {f"{RECIPE}, stock models turned into spiking ones": accepted}, headline=True),
        claim("families-event", "The same models after training, at 16 levels, in the event engine: float64, and float32 with resync",
              "conversions with every integer equal (and logits bitwise equal in float32), %", events, "100 %",
              min(events) == 100, seeds),
    ]  # fmt: skip


def _teach(model: nn.Module, inputs: Any, data: testbed.Digits, sentences: testbed.Sentiment, seed: int) -> None:
    """A short training on the testbed, in the model's own kind of input."""
    if isinstance(inputs, dict) and "input_ids" in inputs:
        batches = [{k: v[i : i + 16] for k, v in sentences.train.items()} for i in range(0, 256, 16)]
    else:
        batches = []
        for i in range(0, 256, 16):
            images, labels = data.train[i : i + 16], data.train_labels[i : i + 16]
            if isinstance(inputs, dict):
                batches.append({"pixel_values": images, "labels": labels})
            elif inputs.shape[1] == 3:
                # As large as the model wants them, and in three equal colours.
                batches.append((nn.functional.interpolate(images, inputs.shape[2:]).expand(-1, 3, -1, -1), labels))
            else:
                batches.append((images, labels))
    testbed.train(model, batches, epochs=1, seed=seed)


def _rival_of(qann: nn.Module, steps: int) -> nn.Module:
    return ModuleConverter(SpikeZIPTFQANNRecipe(steps, "vit")).convert(qann.eval())


@torch.no_grad()
def _run_rival(snn: nn.Module, x: Tensor, steps: int, mode: str) -> Tensor:
    """Logits (steps, B, C) of spikingjelly's SpikeZIP recipe after each step, all current at the first."""
    sj.reset_net(snn)
    sj.set_step_mode(snn, mode)
    zeros = torch.zeros_like(x)
    if mode == "m":
        return snn(torch.cat((x.unsqueeze(0), zeros.unsqueeze(0).expand(steps - 1, *x.shape)))).cumsum(0)
    return torch.stack([snn(x if t == 0 else zeros) for t in range(steps)]).cumsum(0)


@torch.no_grad()
def _sta(model: nn.Module, calibration: Tensor, x: Tensor, steps: int) -> Tensor:
    loader = [(part, torch.zeros(len(part))) for part in calibration.split(128)]
    recipe = STATransformerRecipe(loader, time_steps=steps, mode="spiking_encoder", threshold_scale=0.5)
    snn = Converter(recipe=recipe, device="cpu").convert(model).eval()
    sj.set_step_mode(snn, "m")
    sj.reset_net(snn)
    return snn(torch.cat((x.unsqueeze(0), torch.zeros(steps - 1, *x.shape)))).sum(0)


class QCFS(nn.Module):
    """The MLP's ReLU as integrate-and-fire neurons with half a threshold at the start (2303.04347), all else analog."""

    def __init__(self, threshold: Tensor):
        super().__init__()
        self.threshold, self.v = threshold, None

    def forward(self, x: Tensor) -> Tensor:
        v = (self.threshold / 2 if self.v is None else self.v) + x
        spikes = (v >= self.threshold).float()
        self.v = v - spikes * self.threshold
        return spikes * self.threshold


@torch.no_grad()
def _qcfs(ann: nn.Module, qann: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """Mean logits after each step; thresholds reach as far as the QANN's quantisers."""
    snn = copy.deepcopy(ann).eval()
    for ours, theirs in zip(snn.blocks, qann.blocks, strict=True):  # type: ignore[arg-type]
        quantizer = theirs.mlp.act[0]
        ours.mlp.act = QCFS(quantizer.s.detach() * quantizer.hi)
    total, means = 0.0, []
    for t in range(steps):
        total = total + snn(x)
        means.append(total / (t + 1))
    return means


def _positive_only(x: Tensor, v: Tensor, *, acc: Tensor, theta: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    v = v + x / theta
    spikes = (v >= 1).to(v)
    return spikes, v - spikes, acc + spikes


def _without_tracer(x: Tensor, v: Tensor, *, acc: Tensor, theta: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    v = v + x / theta
    spikes = (v >= 1).to(v) - (v < 0).to(v)
    return spikes, v - spikes, acc + spikes


def _ablated(qann: nn.Module, x: Tensor, neuron: Any) -> Tensor:
    """Logits (64, B, C) with another neuron in place of ST-BIF+."""
    snn = convert(qann, engine="event", dtype=torch.float64, resync=False)
    with mock.patch.object(engine_module, "stbif_plus_step", neuron):
        return snn.run(x, max_steps=64, stop="none", return_trajectory=True).trajectory


def vision_accuracy(seeds: list[int]) -> list[Claim]:
    ann_acc, acc, calibrated = [], {n: [] for n in LEVELS}, {n: [] for n in LEVELS}
    t_eq, by_20, agreement = {n: [] for n in LEVELS}, [], {n: [] for n in LEVELS}
    agreed: dict[str, list[float]] = {}
    curves: dict[str, list[dict[int, float]]] = {}
    for seed in seeds:
        data, ann, qanns, before = vision(seed)
        ann_acc.append(right(ann(data.test), data.test_labels))
        images, labels = data.test[:SHOWN], data.test_labels[:SHOWN]

        def draw(name: str, steps: Any, labels: Tensor = labels) -> None:
            """Keep the accuracy of each step; what has settled stays."""
            points = {t: right(logits, labels[: len(logits)]) for t, logits in steps}
            curves.setdefault(name, []).append(points)

        for n in LEVELS:
            result = convert(qanns[n]).run(data.test, max_steps=128, return_trajectory=True)
            wanted = qanns[n](data.test).argmax(-1)
            acc[n].append(right(qanns[n](data.test), data.test_labels))
            calibrated[n].append(100 * before[n])
            t_eq[n].append(float(result.per_sample_steps.max()))
            agreement[n].append(right(result.logits, wanted))
            steps = [result.trajectory[min(t, result.steps) - 1] for t in range(1, 65)]
            draw(f"SpikeZIP, {n} levels", enumerate((logits[:SHOWN] for logits in steps), 1))
            if n == 16:
                by_20.append(abs(right(steps[19], data.test_labels) - right(result.logits, data.test_labels)))
        wanted = qanns[16](images).argmax(-1)
        for name, trajectory in (
            (RECIPE, _run_rival(_rival_of(qanns[16], 64), images, 64, "s")),
            ("positive-only IF", _ablated(qanns[16], images[:40], _positive_only)),
            ("signed IF without tracer", _ablated(qanns[16], images[:40], _without_tracer)),
            ("QCFS, MLP only", torch.stack(_qcfs(ann, qanns[16], images, 64))),
        ):
            draw(name, enumerate(trajectory, 1))
            agreed.setdefault(name, []).append(right(trajectory[-1], wanted[: trajectory.shape[1]]))
        viewer, three = torchvision_digits(seed, data)
        sta = {t: _sta(viewer, three(data.train[:128]), three(images), t) for t in (4, 8, 16, 32)}
        draw(STA, sta.items())
        agreed.setdefault(STA, []).append(right(sta[32], viewer(three(images)).argmax(-1)))
        agreed.setdefault("its ANN", []).append(right(viewer(three(images)), labels))
    _curves(curves, statistics.fmean(ann_acc))
    picture = ["spikezip/accuracy-over-time.png"]
    drop = {n: statistics.fmean(ann_acc) - statistics.fmean(acc[n]) for n in LEVELS}

    def at(name: str, t: int) -> list[float]:
        return [points[t] for points in curves[name]]

    ours = at("SpikeZIP, 16 levels", 16)
    early = {
        name: [statistics.fmean(points[t] for t in range(1, 17)) for points in curves[name]]
        for name in curves
        if name != STA
    }
    return [
        *(
            claim(f"qann-{n}", f"Digits ViT, {n} levels: the quantised network keeps the ANN's accuracy", "test accuracy, %",
                  acc[n], f"ANN - {bar} points or more", drop[n] <= bar, seeds,
                  {"ANN": ann_acc, "after calibration only": calibrated[n]})
            for n, bar in ((8, 4), (16, 2), (32, 2))
        ),
        claim("agreement", "The spiking network predicts what the quantised one does, at 8, 16 and 32 levels",
              "agreement, %, lowest of the three", [min(agreement[n][i] for n in LEVELS) for i in range(len(seeds))],
              "100 %", min(min(a) for a in agreement.values()) == 100, seeds,
              {f"{RECIPE}, 16 levels, T = 64": agreed[RECIPE], f"{STA}, T = 32, with its own ANN": agreed[STA]}),
        claim("time-to-equilibrium", "16 levels settle within 30 steps", "steps until no neuron fires, slowest of 360 images",
              t_eq[16], "30 or fewer", max(t_eq[16]) <= 30, seeds, {"8 levels": t_eq[8], "32 levels": t_eq[32]},
              note="the other levels are the same network at other settings, not peers"),
        claim("accuracy-by-20", "16 levels: accuracy after 20 steps is the final one", "distance in points, lower is better",
              by_20, "0.5 or less", max(by_20) <= 0.5, seeds),
        claim("accuracy-at-16", "Accuracy after 16 steps, 16 levels, against every other conversion",
              f"test accuracy, %, {SHOWN} images", ours, "not below spikingjelly's SpikeZIP recipe on the same network",
              statistics.fmean(ours) >= statistics.fmean(at(RECIPE, 16)), seeds,
              {**{name: at(name, 16) for name in (RECIPE, STA, "QCFS, MLP only", "positive-only IF", "signed IF without tracer")},
               "ANN of the STA recipe": agreed["its ANN"], "after 8 steps": at("SpikeZIP, 16 levels", 8)},
              note="STA spikes carry whole numbers and its nonlinear operators are analog; QCFS and the two IF networks "
              "(40 images) are written here; at 64 steps QCFS has "
              f"{statistics.fmean(at('QCFS, MLP only', 64)):.1f} %", figures=picture),
        claim("early-accuracy", "Accuracy on the way: mean over the first 16 steps, 16 levels, against every other conversion",
              f"test accuracy, %, {SHOWN} images", early["SpikeZIP, 16 levels"],
              "above spikingjelly's SpikeZIP recipe on the same network",
              statistics.fmean(early["SpikeZIP, 16 levels"]) > statistics.fmean(early[RECIPE]), seeds,
              {name: values for name, values in early.items() if name != "SpikeZIP, 16 levels"}, figures=picture),
        claim("tracer", "Without the tracer and negative spikes the same network is lost (positive-only IF, 64 steps)",
              "agreement with the quantised network, %", agreed["positive-only IF"], "under 50 %",
              max(agreed["positive-only IF"]) < 50, seeds,
              {"ST-BIF+": agreement[16], "signed IF without tracer": agreed["signed IF without tracer"]},
              note="both ablations are written here; 'ours' is the positive-only one"),
    ]  # fmt: skip


def torchvision_digits(seed: int, data: testbed.Digits) -> tuple[nn.Module, Any]:
    """A torchvision ViT with GELU on the same digits, which is what the STA recipe can trace."""
    from torchvision.models import VisionTransformer

    def three(x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)

    torch.manual_seed(seed)
    model, file = (
        VisionTransformer(8, 2, 3, 4, 48, 96, num_classes=10),
        _cache(f"torchvision-{seed}", VIEWER_EPOCHS) / "ann.pt",
    )
    # The start that the testbed's ViT is given; the library's own is for wide models.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
        elif parameter.dim() == 4:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif name.endswith(("class_token", "pos_embedding")):
            nn.init.normal_(parameter, std=0.3)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval(), three
    loader = data.loader(seed=seed)
    testbed.train(model, loader, epochs=VIEWER_EPOCHS, augment=lambda x: three(testbed.roll(x)), seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model, three


def _curves(curves: dict[str, list[dict[int, float]]], ann: float) -> None:
    looks: dict[str, dict[str, Any]] = {
        "SpikeZIP, 8 levels": {"color": "#e39a8e"}, "SpikeZIP, 16 levels": {"color": OURS, "lw": 2.4},
        "SpikeZIP, 32 levels": {"color": "#7d2a1d"}, RECIPE: {"color": PEERS[0], "ls": "--"},
        STA: {"color": PEERS[1], "marker": "o"}, "QCFS, MLP only": {"color": PEERS[2]},
        "positive-only IF": {"color": PEERS[3]}, "signed IF without tracer": {"color": PEERS[4]},
    }  # fmt: skip
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.6, 4.6))
        for name, look in looks.items():
            steps = list(curves[name][0])
            mean = [statistics.fmean(points[t] for points in curves[name]) for t in steps]
            label = f"{name}, 16 levels" if name == RECIPE else name
            axis.plot(steps, mean, label=label, **{"lw": 1.4, **look})
        axis.axhline(ann, color=PEERS[6], ls=":", label="ANN")
        axis.set(xlabel="time-steps", ylabel="test accuracy, %", title="Digits ViT: accuracy over time, mean of the seeds",
                 xlim=(0, 64), ylim=(0, 101))  # fmt: skip
        figure.legend(loc="outside lower center", ncols=3)
        save_figure(figure, RESULTS / "spikezip" / "accuracy-over-time")


def sentiment(seeds: list[int]) -> list[Claim]:
    ann_acc, acc, final, steps, early = [], {n: [] for n in LEVELS}, [], [], {2: [], 4: [], 8: [], 12: []}
    wrong, bitwise = [], True
    for seed in seeds:
        wrong.append(0.0)
        data, ann, qanns = language(seed)
        labels = data.test["labels"]
        ann_acc.append(100 * testbed.accuracy(ann, data.test, labels))
        for n in LEVELS:
            acc[n].append(100 * testbed.accuracy(qanns[n], data.test, labels))
        result = convert(qanns[16]).run(data.test, max_steps=200, return_trajectory=True)
        final.append(right(result.logits, labels))
        for n in LEVELS:
            few = {k: v[:40] for k, v in data.test.items()}
            found = compare(convert(qanns[n]), few, max_steps=400)
            mended = compare(convert(qanns[n], engine="event"), few, max_steps=400)
            wrong[-1] += found.mismatches + mended.mismatches
            bitwise &= found.bitwise and mended.bitwise
        steps.append(float(result.per_sample_steps.max()))
        for t in early:
            early[t].append(right(result.trajectory[t - 1], labels))
    drop = statistics.fmean(ann_acc) - statistics.fmean(acc[16])
    return [
        claim("sentiment-task", "The sentiment grammar is hard enough to tell networks apart", "ANN test accuracy, %", ann_acc,
              "between 90 and 97 %", 90 <= statistics.fmean(ann_acc) <= 97, seeds),
        claim("sentiment-16", "RoBERTa with GELU and padding, 16 levels: the spiking network keeps the ANN's accuracy",
              "test accuracy at equilibrium, %", final, "ANN - 2 points or more", drop <= 2, seeds,
              {"ANN": ann_acc, "QANN": acc[16], "QANN, 8 levels": acc[8], "QANN, 32 levels": acc[32],
               **{f"after {t} steps": v for t, v in early.items()}}),
        claim("sentiment-exact", "The trained RoBERTa at 8, 16 and 32 levels, with padding: drive engine and event engine "
              "with resync, float32", "neurons whose integer differs", wrong, "0, and logits bitwise equal",
              not sum(wrong) and bitwise, seeds),
        claim("sentiment-steps", "RoBERTa at 16 levels settles within 40 steps", "steps, slowest of 600 sentences", steps,
              "40 or fewer", max(steps) <= 40, seeds),
    ]  # fmt: skip


def energy(seeds: list[int]) -> list[Claim]:
    off: list[float] = []
    # By way of counting, levels and network: microjoule an image of each seed.
    prices: dict[tuple[str, int], dict[str, list[float]]] = {}
    saved: dict[str, list[float]] = {}
    settled: dict[str, list[float]] = {}
    same, skippable, wasted = True, [], []
    for seed in seeds:
        data, _, qanns, _ = vision(seed)
        x = data.test[:20]
        for n in LEVELS:
            report, _ = measure(convert(qanns[n]), x, max_steps=200)
            for way, price in (("matrix products", report.paper()), ("everything", report.full())):
                for name, microjoule in price.items():
                    prices.setdefault((way, n), {}).setdefault(name, []).append(microjoule)
        few = data.test[:1]
        counted, end = measure(convert(qanns[16], dtype=torch.float64), few, max_steps=200)
        off.append(float(abs(counted.total_ac - testbed.count_by_hand(qanns[16], few, steps=end.steps))))
        snn = convert(qanns[16])
        plain, result = measure(snn, x, max_steps=200)
        skippable.append(100 * plain.skippable)
        wasted.append(100 * float(result.spikes.wasted.sum()) / result.spikes.total)
        for name, change in MODES.items():
            snn.set_schedule(delay=change.get("delay", 0))
            snn.set_burst(change.get("burst", 1))
            snn.warm_start(data.train[:256] if change.get("warm") else None)
            report, end = measure(snn, x, max_steps=400)
            same &= end.converged and torch.equal(end.logits, result.logits)
            saved.setdefault(name, []).append(100 * (1 - report.total_ac / plain.total_ac))
            settled.setdefault(name, []).append(end.steps)
            if name == "delay 1":
                prices.setdefault(("matrix products", 0), {}).setdefault("SNN", []).append(report.paper()["SNN"])
        snn = convert(qanns[16])
        snn.run(x, max_steps=200)
        noise = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        stream = snn.run(x + noise, max_steps=200, reset=False)
        same &= stream.converged and torch.equal(stream.logits, snn.qann(x + noise))
        saved.setdefault("next frame of a stream, spikes", []).append(
            100 * (1 - stream.spikes.total / result.spikes.total)
        )
        settled.setdefault("next frame of a stream, spikes", []).append(stream.steps)
    _schedules(saved, settled)
    mean = statistics.fmean
    rows = []
    for (way, n), price in prices.items():
        if n == 0 or (way == "everything" and n != 16):
            continue
        ours, ann = price["SNN"], price["ANN fp32"]
        what = "matrix products only (the papers' way of counting)" if way == "matrix products" else (
            "with neuron updates, LayerNorm, softmax and running sums")  # fmt: skip
        more = {"SNN, delay 1": prices["matrix products", 0]["SNN"]} if (way, n) == ("matrix products", 16) else {}
        rows.append(
            claim(f"energy-{n}" if way == "matrix products" else f"energy-{n}-full",
                  f"{n} levels cost less than the ANN in fp32, {what}", "microjoule an image, lower is better", ours,
                  "less than ANN fp32", mean(ours) < mean(ann), seeds,
                  {"ANN fp32": ann, "QANN int8": price["QANN int8"], **more},
                  note=f"{mean(wasted):.0f} % of the spikes take others back or are taken back" if more else "")
        )  # fmt: skip
    price = prices["matrix products", 16]
    return [
        claim("energy-count", "Totals of the energy report equal a count that follows every event to every output",
              "difference, accumulations", off, "0", not sum(off), seeds),
        *rows,
        claim("energy-int8", "16 levels cost less than the same quantised network in int8 arithmetic, matrix products only",
              "microjoule an image, lower is better", price["SNN"], "less than QANN int8",
              mean(price["SNN"]) < mean(price["QANN int8"]), seeds, {"ANN fp32": price["ANN fp32"], "QANN int8": price["QANN int8"]}),
        claim("delay", "Starting each stage one step later saves accumulations, with bitwise the same logits (16 levels)",
              "accumulations saved, %", saved["delay 1"], "40 % or more, logits equal in every mode",
              mean(saved["delay 1"]) >= 40 and same, seeds,
              {**{name: values for name, values in saved.items() if name not in ("plain", "delay 1")},
               **{f"steps, {name}": values for name, values in settled.items()}},
              note="the other columns are this package's other modes, not peers; a burst of n counts as n",
              figures=["spikezip/schedules.png"], headline=True),
        claim("token-skipping", "Tokens whose input did not spike in a step need no new row in a linear map (16 levels)",
              "rows of all steps that could be skipped, %", skippable, "more than 0", min(skippable) > 0, seeds,
              note="counted, not skipped: the engine computes them"),
    ]  # fmt: skip


MODES: dict[str, dict[str, Any]] = {
    "plain": {}, "delay 1": {"delay": 1}, "delay 2": {"delay": 2}, "burst 2": {"burst": 2}, "burst 4": {"burst": 4},
    "warm start": {"warm": True}, "delay 1, burst 4": {"delay": 1, "burst": 4},
}  # fmt: skip


def _schedules(saved: dict[str, list[float]], settled: dict[str, list[float]]) -> None:
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.4, 4.0))
        for name in MODES:
            x, y = statistics.fmean(settled[name]), 100 - statistics.fmean(saved[name])
            axis.plot(x, y, "o", color=PEERS[0] if name == "plain" else OURS)
            axis.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points")
        axis.set(xlabel="steps to equilibrium", ylabel="accumulations, % of plain", ylim=(0, 112),
                 title="Same logits to the last bit: steps against work, 16 levels")  # fmt: skip
        axis.set_xlim(0, axis.get_xlim()[1] * 1.1)
        save_figure(figure, RESULTS / "spikezip" / "schedules")


def speed(seeds: list[int]) -> list[Claim]:
    single, multi, settled, scans, errors = [], [], [], [], []
    scan_eager, layers = [], []
    for seed in seeds:
        data, _, qanns, _ = vision(seed)
        x, qann = data.test[:20], qanns[16]
        ours, rival = convert(qann), _rival_of(qann, 64)
        single.append(time_both(lambda ours=ours, x=x: ours.run(x, max_steps=32, stop="none"),
                                lambda rival=rival, x=x: _run_rival(rival, x, 32, "s"), repeats=3).ratio)  # fmt: skip
        multi.append(time_both(lambda ours=ours, x=x: ours.run(x, max_steps=32, stop="none"),
                               lambda rival=rival, x=x: _run_rival(rival, x, 32, "m"), repeats=3).ratio)  # fmt: skip
        layers.append(time_both(lambda ours=ours, x=x: ours.run_multi_step(x, 32),
                                lambda rival=rival, x=x: _run_rival(rival, x, 32, "m"), repeats=3).ratio)  # fmt: skip
        # The library does not say when it has settled: its user picks T, and the paper's T is 64.
        settled.append(time_both(lambda ours=ours, x=x: ours.run(x),
                                 lambda rival=rival, x=x: _run_rival(rival, x, 64, "s"), repeats=3).ratio)  # fmt: skip
        errors.append(float((_run_rival(rival, x, 64, "s")[-1] - qann(x).detach()).abs().max()))
        x_seq = torch.randn(32, 400_000, generator=torch.Generator().manual_seed(seed))
        theta, state = torch.tensor(0.4), {"acc": torch.zeros(400_000), "lo": -8, "hi": 7}
        half = torch.full((400_000,), 0.5)
        bounds = (torch.tensor(7.0), torch.tensor(-8.0))

        def library(x_seq: Tensor = x_seq, theta: Tensor = theta, half: Tensor = half, bounds: Any = bounds) -> Any:
            return sj.stbif_multi_step(x_seq, half, torch.zeros_like(half), theta, *bounds)

        def scan(
            backend: str, x_seq: Tensor = x_seq, theta: Tensor = theta, half: Tensor = half, state: Any = state
        ) -> Any:
            return stbif_plus_multi_step(x_seq, half, theta=theta, backend=backend, **state)

        assert torch.equal(scan("compile")[0] * theta, library()[0]), "the spikes differ"
        scans.append(time_both(lambda scan=scan: scan("compile"), library, repeats=5).ratio)
        scan_eager.append(time_both(lambda scan=scan: scan("eager"), library, repeats=3).ratio)
    mean = statistics.fmean
    return [
        claim("speed-equal-steps", "At equal steps the drive engine is faster than spikingjelly's SpikeZIP recipe (digits ViT, "
              "16 levels, 32 steps, 20 images)", "peer's time / ours, higher is better", single, "2 or more", mean(single) >= 2,
              seeds, {"both layer by layer": layers, "ours step by step, the recipe layer by layer": multi}),
        claim("speed-settled", "To a settled answer it is faster still: it stops by itself, the recipe runs the paper's 64 steps",
              "peer's time / ours, higher is better", settled, "3 or more", mean(settled) >= 3, seeds,
              note=f"largest logit error of the recipe after 64 steps: {max(errors):.2g}; ours is 0"),
        claim("neuron-scan", "Compiled neuron scan, 32 steps of 400000 neurons, against spikingjelly's stbif_multi_step, "
              "identical spikes", "peer's time / ours, higher is better", scans, "5 or more", mean(scans) >= 5, seeds,
              {"ours without compiling": scan_eager}),
    ]  # fmt: skip


def neuron_gpu(seeds: list[int]) -> list[Claim]:
    return [
        Claim("neuron-scan-gpu", PAPER, "On a GPU the neuron scan (one Triton kernel) gives the eager spikes, is faster than "
              "spikingjelly's CUDA path, and takes no longer than a copy of its input", "peer's time / ours, higher is better", None, {}, "1 or more", None, [],
              note="spikezip bench --device cuda --backend triton --steps 32 --neurons 4000000 (prints the device, both ratios and "
              "whether the spikes are identical)"),
        Claim("imagenet", PAPER, "ViT-L with 32 levels on ImageNet reaches the paper's 83.82 % as a spiking network, with the "
              "logits of its quantised network", "top-1 accuracy, %", None, {}, "83.8 % or more", None, [],
              note="spikezip import-official vit_large_q32.pth --arch vit_large --levels 32 --output vit-l; "
              "spikezip eval vit-l --data imagenet-val.safetensors --max-steps 200 --device cuda"),
    ]  # fmt: skip


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The epoch parameter")
    sys.exit(run_benchmark("spikezip", [vision_accuracy, energy, exactness, speed, sentiment, families, neuron_gpu,
                                        help_time("spikezip", PAPER)],
                           libraries=["spikingjelly", "timm", "torchvision", "transformers"]) is None)  # fmt: skip
