"""The drawn world: its faces, its exact judge, its packaged model; and the public interface."""

import numpy as np
import torch
from facescore import InpaintPairBuilder
from facescore.testbed import DEFECTS, Templates, base_pipeline, draw_faces, draw_houses, sample_faces, to_pil


def test_drawings_differ_only_inside_the_face():
    faces = sample_faces(20, seed=0)
    clean = draw_faces(faces)
    assert clean.shape == (20, 3, 32, 32) and clean.min() >= 0 and clean.max() <= 1
    assert np.array_equal(clean, draw_faces(sample_faces(20, seed=0)))
    ys, xs = np.mgrid[:32, :32] + 0.5
    for defect in range(1, len(DEFECTS)):
        changes = [np.abs(draw_faces(faces, defect, s) - clean).mean((1, 2, 3)) for s in (0.25, 1.0)]
        assert (changes[1] > changes[0]).all() and (changes[0] > 0).all()
        changed = np.abs(draw_faces(faces, defect) - clean).max(1) > 1e-6
        for i, (x1, y1, x2, y2) in enumerate(faces.boxes()):
            assert not changed[i][(xs < x1 - 1) | (xs > x2 + 1) | (ys < y1 - 1) | (ys > y2 + 1)].any()
    assert draw_houses(3, seed=0).shape == (3, 3, 32, 32)


def test_judge_knows_every_drawing():
    templates = Templates.all()
    kinds, distance = templates.judge(templates.pixels(np.arange(len(templates.kinds))))
    assert (kinds == templates.kinds).all()
    assert (distance[np.isin(kinds, (0, -1))] < 1e-6).all() and (distance[kinds > 0] > 0.1).all()


def test_packaged_model_draws_faces_and_houses():
    pipe, templates = base_pipeline(), Templates.all()
    for prompt, kinds in (("a face", range(len(DEFECTS))), ("a house", (-1,))):
        pixels = torch.stack(pipe([prompt] * 12, output_type="pt", generator=torch.Generator().manual_seed(0)).images)
        assert pixels.shape == (12, 3, 16, 16)
        assert np.isin(templates.judge(pixels)[0], kinds).mean() > 0.9


def test_packaged_varied_model_repaints_more_the_stronger_it_is_asked_to():
    faces = sample_faces(12, seed=3)
    images = to_pil(draw_faces(faces))
    items = [
        {"id": f"{i}", "image": a, "boxes": [b]} for i, (a, b) in enumerate(zip(images, faces.boxes(), strict=True))
    ]
    pipe = base_pipeline("varied")
    assert pipe.unet.config.in_channels == 12 and pipe.vae_scale_factor == 2
    changes, masked = [], []
    for strength in (0.2, 0.5, 1.0):
        builder = InpaintPairBuilder(
            pipe,
            "full-image",
            strength,
            min_face=8,
            missing="ignore",
            batch_size=12,
            options={"num_inference_steps": 10},
        )
        made = list(builder.pairs(items))
        assert len(made) == len(items)
        inside = np.stack([np.asarray(p.mask) for p in made]) == 255
        both = [np.stack([np.asarray(getattr(p, side), dtype=float) for p in made]) for side in ("win", "lose")]
        changes.append(np.abs(both[0] - both[1])[inside].mean())
        masked.append(np.abs(both[0] - both[0][::-1])[inside & inside[::-1]].mean())
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 0.3 * masked[0]  # a light repaint leaves the person; two people differ by far more


def test_one_generator_per_picture_is_independent_of_the_batch():
    pipe = base_pipeline()

    def draw(seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.stack(
            pipe(["a face"] * len(seeds), output_type="pt", num_inference_steps=3, generator=generators).images
        )

    torch.testing.assert_close(draw([1, 2, 3])[1:], draw([2, 3]), rtol=1e-4, atol=1e-4)


def test_public_names():
    import facescore

    for name in facescore.__all__:
        assert getattr(facescore, name).__doc__
