"""The instructions of a compiled NVIDIA kernel that its blocks of full work take, without a GPU.

Read from `cuobjdump -sass`. Of all ways through a kernel, the one with the widest loads from memory
is taken, and of several the shortest: the kernels have other ways for unaligned addresses and for
the end of a tensor, where accesses are narrow. A loop counts if it loads from memory, and not
less than half as wide as the widest loop; the others are for tails.

The clocks are those of a warp that has the multiprocessor to itself: an instruction waits for its
sources, and one is issued per clock, in order. LATENCIES are rounded from microbenchmarks of A100,
RTX 4090 and H100 (arXiv:2402.13499), which lie within 20 % of each other; device memory is taken
somewhat slower than measured there, as it is under load. Narrow loads are of tables, statistics and
partial sums, which lie in L2.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LATENCIES = {  # clocks until a result can be used
    "wide LDG": 550,
    "LDG|LD|ATOMG|ATOM": 270,
    "LDS|LDSM|SHFL|REDUX|CREDUX|BAR": 30,
    "LDC|LDCU|S2R|S2UR|MUFU|I2F|F2I|F2F|R2UR|CALL": 25,
    "D[A-Z]+": 16,
}
ARITHMETIC = 5
LEFT_OUT = -1  # in place of a loop
PIPES = {  # which instructions a pipe of a multiprocessor takes
    "fma": re.compile(r"FFMA2?|FADD2?|FMUL2?|IMAD|HFMA2|HADD2|HMUL2"),
    "special": re.compile(r"MUFU|I2F|F2I|F2F|POPC|FLO"),
    "memory": re.compile(r"LDG|STG|LDS|STS|LD|ST|SHFL|ATOMG|LDSM"),
    "alu": re.compile(
        r"IADD3?|IADD3X?|VIADD|LOP3|SHF|ISETP|FSETP|FMNMX3?|VIMNMX3?|VIADDMNMX|IMNMX|PRMT|SEL|FSEL"
        r"|LEA|MOV|I2FP|F2FP|IABS|PLOP3|FCHK|SGXT|BMSK|R2P|P2R|VOTE"
    ),
}


@dataclass(frozen=True)
class Instruction:
    at: int
    guarded: bool  # by a predicate
    name: str
    modifiers: str
    operands: tuple[str, ...]

    @property
    def width(self) -> int:
        """Bytes per thread of an access to device memory; else 0."""
        if self.name not in ("LDG", "STG", "LD", "ST"):
            return 0
        bits = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", self.modifiers)
        return int(bits[1]) // 8 if bits else 4

    @property
    def target(self) -> int | None:
        if self.name != "BRA" or ".DIV" in self.modifiers:  # to where threads have gone apart
            return None
        return int(self.operands[-1].split("`")[-1].strip("()"), 16)

    @property
    def ends(self) -> bool:
        if self.name in ("EXIT", "RET"):
            return not self.guarded
        unconditional = len(self.operands) == 1 and not self.guarded
        return self.target is not None and unconditional


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)\s*(.*?)\s*;")


def listings(binary: Path, tool: str) -> dict[str, list[Instruction]]:
    """By mangled function and architecture ("f@sm_90"), as in `triton_builds.usage`."""
    printed = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    found: dict[str, list[Instruction]] = {}
    architecture = ""
    for line in printed.stdout.splitlines():
        if named := re.search(r"code for (sm_\d+)", line):
            architecture = named[1]
        elif named := re.search(r"Function : (\S+)", line):
            function = found.setdefault(f"{named[1]}@{architecture}", [])
        elif parsed := _LINE.search(line):
            at, guard, name, modifiers, rest = parsed.groups()
            operands = tuple(part.strip() for part in rest.split(",") if part.strip())
            function.append(Instruction(int(at, 16), guard is not None, name, modifiers, operands))
    return found


@dataclass(frozen=True)
class Part:
    """Of a warp: straight code, or one round of a loop.

    Attributes:
        pipes: instructions by pipe, and all of them as "issue".
        clocks: of a warp alone.
        loaded_bytes: per thread, by vectors: of 16 bytes, and in loops also of 8.
    """

    loops: bool
    pipes: dict[str, int]
    clocks: float
    loaded_bytes: int


def hot_path(listing: list[Instruction], through: str = "") -> list[Part]:
    """The parts in order. through: one of these instructions lies on the way, by its name."""
    blocks, follows = _blocks(listing)
    back, order = _depth_first(follows)
    forward = {b: [o for o in follows[b] if (b, o) not in back] for b in order}
    path = _widest(blocks, forward, through)
    loop_of = _loops(path, back, follows, blocks)
    warp = _Warp()
    return [
        warp.part([i for b in together for i in blocks[b]], loops=head is not None)
        for head, together in itertools.groupby(path, loop_of.__getitem__)
        if head != LEFT_OUT
    ]


def _width_of_loads(code: list[Instruction]) -> int:
    """Grows with how much is loaded and with how wide; zeros are stored where nothing is loaded."""
    return sum(i.width**2 for i in code if i.name == "LDG")


def _widest(
    blocks: dict[int, list[Instruction]], forward: dict[int, list[int]], through: str
) -> list[int]:
    """Blocks of the way that is taken. forward: in an order in which all edges lead forward."""
    # by block, and whether one of `through` still has to come: score, -length, what comes next
    best: dict[tuple[int, bool], tuple[float, int, int | None]] = {}
    for b in reversed(forward):
        score = float(_width_of_loads(blocks[b]))
        score -= math.inf if any(i.name == "CALL" for i in blocks[b]) else 0  # a rare division
        here = any(re.fullmatch(through, i.name) for i in blocks[b])
        for wanted in (False, True):
            wanted_after = wanted and not here
            ways = [(*best[o, wanted_after][:2], o) for o in forward[b]]
            ends = (-math.inf if wanted_after else 0.0, 0, None)
            further, length, to = max(ways, key=lambda way: way[:2], default=ends)
            best[b, wanted] = (score + further, length - len(blocks[b]), to)
    path, at, wanted = [], next(iter(forward)), bool(through)
    while at is not None:
        path.append(at)
        following = best[at, wanted][2]
        wanted = wanted and not any(re.fullmatch(through, i.name) for i in blocks[at])
        at = following
    return path


def _blocks(listing: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list]]:
    """Basic blocks by their first address, 0 the entry, and which may come after which."""
    known = {i.at for i in listing}
    targets = {i.target for i in listing} & known
    blocks: dict[int, list[Instruction]] = {}
    follows: dict[int, list[int]] = {}
    start = None
    for i, following in zip(listing, [*listing[1:], None], strict=True):
        if start is None or i.at in targets:
            start = i.at
            blocks[start], follows[start] = [], []
        blocks[start].append(i)
        splits = i.target is not None or i.ends or (following and following.at in targets)
        if not splits:
            continue
        if i.target in known:
            follows[start].append(i.target)
        if following is not None and not i.ends:
            follows[start].append(following.at)
        start = None
    return blocks, follows


def _depth_first(follows: dict[int, list[int]]) -> tuple[set[tuple[int, int]], list[int]]:
    """Edges that close a loop, and the blocks such that all others lead to later ones."""
    back: set[tuple[int, int]] = set()
    open_blocks, done, finished = {0}, set(), []
    stack = [(0, iter(follows[0]))]
    while stack:
        block, others = stack[-1]
        for other in others:
            if other in open_blocks:
                back.add((block, other))
            elif other not in done:
                open_blocks.add(other)
                stack.append((other, iter(follows[other])))
                break
        else:
            stack.pop()
            open_blocks.discard(block)
            done.add(block)
            finished.append(block)
    return back, finished[::-1]


def _loops(
    path: list[int],
    back: set[tuple[int, int]],
    follows: dict[int, list[int]],
    blocks: dict[int, list[Instruction]],
) -> dict[int, int | None]:
    """For blocks of the path, the head of their innermost loop, None, or LEFT_OUT."""
    before: dict[int, list[int]] = {b: [] for b in follows}
    for b, others in follows.items():
        for other in others:
            before[other].append(b)
    members: dict[int, set[int]] = {}
    for end, head in back:
        body, waiting = members.setdefault(head, {head}), [end]
        while waiting:
            b = waiting.pop()
            if b not in body:
                body.add(b)
                waiting += before[b]
    weights = {}
    for head, body in members.items():
        weights[head] = sum(_width_of_loads(blocks[b]) for b in path if b in body)
    widest = max(weights.values(), default=0)
    found: dict[int, int | None] = {}
    for b in path:
        heads = sorted((h for h in members if b in members[h]), key=lambda h: len(members[h]))
        hot = [h for h in heads if weights[h] * 2 > widest]
        found[b] = hot[0] if hot else LEFT_OUT if heads else None
    return found


class _Warp:
    """Alone on its multiprocessor."""

    def __init__(self) -> None:
        self._clock = 0
        self._ready: dict[str, int] = {}

    def part(self, code: list[Instruction], *, loops: bool) -> Part:
        if loops:
            self._play(code)  # the first round differs: what came before is still under way
        started = self._clock
        self._play(code)
        pipes = Counter({"issue": len(code)})
        for i in code:
            pipes.update(name for name, names in PIPES.items() if names.fullmatch(i.name))
        least = 8 if loops else 16  # 8 outside are of a table
        loaded = sum(i.width for i in code if i.name == "LDG" and i.width >= least)
        return Part(loops, dict(pipes), self._clock - started, loaded)

    def _play(self, code: list[Instruction]) -> None:
        for i in code:
            writes_nothing = i.name.startswith(("ST", "BAR", "BRA", "RED")) or not i.operands
            sources = i.operands if writes_nothing else i.operands[1:]
            waits = [self._ready.get(r, 0) for text in sources for r in _registers(text)]
            self._clock = max(self._clock + 1, *waits, 0)
            if i.name == "BAR":
                self._clock += _latency(i)
            if not writes_nothing:
                for register in _registers(i.operands[0], i.modifiers):
                    self._ready[register] = self._clock + _latency(i)


def _latency(i: Instruction) -> int:
    name = "wide LDG" if i.name == "LDG" and i.width >= 8 else i.name
    return next((n for names, n in LATENCIES.items() if re.fullmatch(names, name)), ARITHMETIC)


def _registers(text: str, modifiers: str = "") -> list[str]:
    """Registers that an operand names. modifiers: of an instruction that writes several."""
    count = 4 if ".128" in modifiers else 2 if re.search(r"\.(64|WIDE)\b", modifiers) else 1
    names = []
    for kind, number, more in re.findall(r"\b(U?[RP])(\d+)((?:\.\w+)*)", text):
        wide = 1 if kind[-1] == "P" else 2 if ".64" in more else count
        names += [f"{kind}{int(number) + k}" for k in range(wide)]
    return names
