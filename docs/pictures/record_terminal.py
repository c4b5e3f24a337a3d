"""Runs the commands below in a terminal, and draws what stands there at the end: terminal.svg.

    pip install pyte
    python docs/pictures/record_terminal.py

Nothing is typed by hand: the commands run in an empty folder, in a pseudo-terminal of `COLUMNS`.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 96, 400
PICTURE = Path(__file__).with_name("terminal.svg")
COMMANDS = (
    "progtuning doctor",
    "progtuning demo --train-rows 480 --validation-rows 240",
)


def run(command: str, screen: pyte.Screen, folder: str) -> None:
    """Run the command in a terminal, and draw what it writes on `screen`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": tools, "TERM": "xterm-256color"}
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m\r\n".encode())
    with subprocess.Popen(
        command, shell=True, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        try:
            while written := os.read(ours, 65536):
                stream.feed(written)
        except OSError:  # so Linux says that the other side is closed
            pass
    os.close(ours)
    if process.returncode:
        sys.exit("\n".join(screen.display).rstrip() + f"\nexit status {process.returncode}")
    stream.feed(b"\r\n")


def style_of(char: pyte.screens.Char) -> Style:
    colour = "yellow" if char.fg == "brown" else char.fg.replace("bright", "bright_")
    if re.fullmatch("[0-9a-f]{6}", colour):
        colour = f"#{colour}"
    return Style(color=colour, bold=char.bold, italic=char.italics)


def styled_line(row: dict[int, pyte.screens.Char]) -> Text:
    line = Text(no_wrap=True)
    for style, chars in groupby((row[column] for column in range(COLUMNS)), key=style_of):
        line.append("".join(char.data for char in chars), style)
    line.rstrip()
    return line


def draw(screen: pyte.Screen) -> None:
    lines = [styled_line(screen.buffer[i]) for i in range(screen.cursor.y)]
    while lines and not lines[-1]:
        lines.pop()
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(line, soft_wrap=True)
    # rich's own format fetches its font from another host, which a picture must not
    code_format = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    console.save_svg(str(PICTURE), title="progtuning", code_format=code_format)


def main() -> None:
    screen = pyte.Screen(COLUMNS, LINES)
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            run(command, screen, folder)
    draw(screen)


if __name__ == "__main__":
    main()
