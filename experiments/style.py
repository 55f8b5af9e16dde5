"""How pictures look: two hues, greys, no boxes; and how they are kept."""

import io
import pathlib

from matplotlib.figure import Figure

from train import workdir as workdir_lib

# Two hues that the colour-blind tell apart (Okabe & Ito 2008), a darker one of
# the first, and greys.
BLUE, ORANGE, DARK = '#56b4e9', '#d55e00', '#1f77b4'
INK, GREY, FAINT = '#333333', '#999999', '#dddddd'
SMALL = {'fontsize': 9, 'color': INK}


def plain(axes, along: str = 'y'):
  """Faint lines at the values of that axis, and no box."""
  axes.grid(axis=along, color=FAINT, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(length=0, colors=INK)
  for side in ('top', 'right', 'left'):
    axes.spines[side].set_visible(False)
  axes.spines['bottom'].set_color(FAINT)


def legend(figure: Figure):
  """What the lines and marks are, below everything."""
  names = figure.axes[0].get_legend_handles_labels()[1]
  made = figure.legend(
    loc='outside lower center',
    ncols=len(names) if len(names) <= 5 else 3,
    frameon=False,
    labelcolor=INK,
    fontsize=9,
    handlelength=1.6,
    columnspacing=1.6,
  )
  for handle in made.legend_handles:
    handle.set_alpha(1)  # Faint lines are many; this is one.


def save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
  """Writes a picture whole or not at all."""
  picture = io.BytesIO()  # No half of one is left where there is no room.
  figure.savefig(picture, dpi=160)
  workdir_lib.write(path, picture.getvalue())
  return path
