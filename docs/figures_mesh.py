"""Draws mesh.svg: 16 devices as a mesh of two along each of the four axes.

  python docs/figures_mesh.py
"""

from pathlib import Path

# A colour for each quarter of a large weight: fsdp picks the row of the quarter
# and tensor its column.
COLOURS = (('#4878a8', '#e0a03c'), ('#5c9c6c', '#b8566a'))
SIDE, GAP = 96, 8  # of a device
TOP, LEFT = 108, 12


def text(x, y, words, size=13, anchor='middle', weight='normal',
         colour='#222'):
  return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" '
          f'text-anchor="{anchor}" font-weight="{weight}">{words}</text>')


def box(x, y, width, height, fill='none', stroke='#888', radius=6, extra=''):
  return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
          f'rx="{radius}" fill="{fill}" stroke="{stroke}" {extra}/>')


def device(x, y, data, fsdp, tensor):
  """Returns one device: its part of a weight, and its rows of a batch."""
  parts = [box(x, y, SIDE, SIDE, '#fff', '#444')]
  size = 19
  for i in range(2):
    for j in range(2):
      mine = (i, j) == (fsdp, tensor)
      parts.append(box(
          x + SIDE / 2 + (j - 1) * size, y + 12 + i * size, size, size,
          COLOURS[i][j] if mine else '#f3f3f3', '#bbb', 0))
  first = 8 * data + 4 * fsdp
  parts.append(text(
      x + SIDE / 2, y + 67, f'fsdp {fsdp}, tensor {tensor}', 11.5,
      colour='#555'))
  parts.append(text(x + SIDE / 2, y + 84, f'rows {first + 1}–{first + 4}', 14))
  return parts


def group(x, y, data):
  """Returns the four devices that share one copy of the weights."""
  width = 2 * SIDE + 3 * GAP
  parts = [box(x, y, width, width, '#eef2f6', '#9ab')]
  for fsdp in range(2):
    for tensor in range(2):
      parts += device(x + GAP + tensor * (SIDE + GAP),
                      y + GAP + fsdp * (SIDE + GAP), data, fsdp, tensor)
  return parts


def picture() -> str:
  """Returns the whole drawing as SVG."""
  side = 2 * SIDE + 3 * GAP  # of a group of four devices
  outer = 2 * side + 3 * GAP  # width of a half with all rows
  height = TOP + side + 2 * GAP + 60
  width = 2 * LEFT + 2 * outer + 20
  parts = [box(0, 0, width, height, '#fff', '#fff', 0)]
  for direction, sign in enumerate('+−'):
    x = LEFT + direction * (outer + 20)
    parts.append(box(x, TOP - 34, outer, side + GAP + 34, '#fafafa', '#666'))
    parts.append(text(
        x + outer / 2, TOP - 46,
        f'direction {direction}: loss at θ {sign} εz, all 16 rows', 15,
        weight='bold'))
    for data in range(2):
      left = x + GAP + data * (side + GAP)
      parts.append(text(
          left + side / 2, TOP - 12, f'data {data}: a copy of the weights', 14))
      parts += group(left, TOP, data)
  x, y = LEFT, TOP + side + GAP  # the axes within a group, at the first one
  middle = y + 34
  parts.append(text(
      x, middle, 'The coloured quarter is the part of a large weight that a '
      'device holds: fsdp and tensor split it, data and direction copy it.',
      14, 'start'))
  parts.append(text(
      x, middle + 20, 'data and fsdp split the rows of the batch; tensor '
      'splits the arithmetic of a row. z is drawn where it is needed, and '
      'never sent.', 14, 'start'))
  parts.append(text(
      LEFT, 28, 'mesh.direction=2  mesh.data=2  mesh.fsdp=2  mesh.tensor=2: '
      '16 devices, a batch of 16 rows', 15, 'start', 'bold'))
  return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} '
          f'{height:g}" font-family="Helvetica, Arial, sans-serif" role="img">'
          '<title>A mesh of 16 devices with four axes</title>'
          + '\n'.join(parts) + '</svg>\n')


if __name__ == '__main__':
  (Path(__file__).parent / 'mesh.svg').write_text(picture())
