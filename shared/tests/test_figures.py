from pathlib import Path

from tenfold_shared.figures import save, style


def draw(folder: Path) -> Path:
    with style() as plt:
        figure, axes = plt.subplots()
        axes.plot([0, 1], [1, 0])
        return save(figure, folder / "new" / "loss.v2")


def test_png_and_svg_of_the_same_picture_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert first.name == "loss.v2.png" and first.read_bytes()[:4] == b"\x89PNG"
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".svg").read_bytes() == second.with_suffix(".svg").read_bytes()


def test_style_ends_with_its_block(tmp_path: Path) -> None:
    import matplotlib

    before = matplotlib.rcParams["axes.grid"]
    draw(tmp_path)
    assert matplotlib.rcParams["axes.grid"] == before
