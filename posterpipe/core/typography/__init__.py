"""Titles set in type on generated posters.

What belongs here: from an image and a title to the same image with the title on it. What does not:
drawing the picture (`sampler`) and reading the title back (`metrics.legibility`).

Diffusion models of this size draw shapes like letters and no words, so the title is set afterwards.
The layout is computed: candidate blocks (line breaks, widths, places) are scored by how little of
the main object they cover, how much they cover of what the model meant to be lettering, how large
the letters are, and whether the ground must be helped. Contrast is that of WCAG 2.2 (success
criterion 1.4.3), and what is promised is what is measured on the finished ground.

- `colour`: Lab, luminance, contrast.
- `fonts`: type styles, and which font can write a title.
- `signs`: capitals and pictographs.
- `lines`: line breaks, kerning, hanging signs.
- `saliency`: what is ground, object and mark on an image.
- `layout`: where the title goes and how large.
- `ground`: the letters' colour, and the ground below them.
- `render`: one title on one image.
- `titled`: the table of titled posters over the store.
"""

from posterpipe.core.typography.fonts import STYLES, TitleImpossible, choose_style
from posterpipe.core.typography.render import Layout, enlarged, set_title
from posterpipe.core.typography.titled import TITLED_COLUMNS, lettering_id, set_titles, titled_key

__all__ = [
    "STYLES", "TITLED_COLUMNS", "Layout", "TitleImpossible", "choose_style", "enlarged",
    "lettering_id", "set_title", "set_titles", "titled_key",
]  # fmt: skip
