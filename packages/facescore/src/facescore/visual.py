"""Pictures with boxes and scores drawn in."""

from pathlib import Path

from PIL import ImageDraw, ImageFont
from tenfold_shared.hub import replace_atomically

from facescore.images import open_image
from facescore.reward.scorer import FaceScoreResult

COLOUR = "#c1432e"


def draw_result(image: str | Path, result: FaceScoreResult, path: Path) -> Path:
    """Write a PNG of the image with each face's box and score, and return its path. Small images are enlarged."""
    picture = open_image(image)
    scale = max(1, round(256 / max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), 0)
    draw = ImageDraw.Draw(picture)
    size = max(12, picture.height // 28)
    font = ImageFont.load_default(size)

    def label(text: str, place: tuple[float, float]) -> None:
        left, top, right, bottom = draw.textbbox(place, text, font=font)
        draw.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=COLOUR)
        draw.text(place, text, fill="white", font=font)

    for face in result.faces:
        x1, y1, x2, y2 = (v * scale for v in face.box)
        x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, picture.width - 1), min(y2, picture.height - 1)
        draw.rectangle((x1, y1, x2, y2), outline=COLOUR, width=max(2, size // 6))
        label(f"{face.score:.2f}", (x1, max(0, y1 - size - 4)))
    if not result.faces:
        label("no face", (4, 4))
    with replace_atomically(path) as partial:
        picture.save(partial, "PNG")
    return path
