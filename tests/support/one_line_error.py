"""What a bad call of the command says."""

from __future__ import annotations

import pytest

from progtuning_kernels.cli.app import main


def one_line_error(capsys, arguments: list[str], status: int = 2) -> str:
    """The one line of standard error that the call ends with."""
    capsys.readouterr()  # what the test itself has printed
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]
