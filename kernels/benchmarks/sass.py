"""Reads the machine code of a kernel (SASS, as `cuobjdump -sass` prints it) and counts what a thread executes.

The code becomes basic blocks, and these a nest of natural loops. Which way a thread takes at a branch is not in the
code, so one path through every loop is assumed: it passes the loops within, takes the most exponentials, loads and
stores the most bytes of global memory, and is the shortest of those that do. That is the path of a full tile; blocks
with accesses wider than the tensors' alignment permits, and with calls (the slow way of a 64-bit division), are not on
it. An `Expected` in place of the default says which exponentials and bytes are meant where a branch is an option.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field

CLASSES = ("fma", "mufu", "load_store", "shuffle", "integer", "tensor", "other")
"""Integer: whatever runs beside floating point, also comparisons, selections, moves and conversions."""

_OF_CLASS = {
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 DFMA DADD DMUL",
    "mufu": "MUFU",
    "load_store": "LD ST LDG STG LDS STS LDL STL LDC LDSM STSM LDGSTS LDGDEPBAR LDTM STTM "
    "ATOM ATOMG ATOMS RED REDG CCTL",
    "shuffle": "SHFL MOVM REDUX",
    "tensor": "HMMA IMMA DMMA QMMA HGMMA IGMMA QGMMA UTCHMMA UTCQMMA UTCIMMA",
    "other": "BRA BRX JMP JMX EXIT CALL RET BSSY BSYNC BREAK BMOV BAR NOP WARPSYNC DEPBAR MEMBAR ERRBAR FENCE SYNCS "
    "NANOSLEEP YIELD KILL BPT WARPGROUP ELECT PREEXIT ACQBULK VOTE VOTEU S2R S2UR CS2R R2UR",
}
_CLASS = {opcode: name for name, opcodes in _OF_CLASS.items() for opcode in opcodes.split()}
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # the predicate, "" without
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """One of CLASSES."""
        return _CLASS.get(self.name, "integer")

    @property
    def bytes(self) -> int:
        """Of global memory, per thread; 0 for other instructions."""
        if self.name not in ("LDG", "STG", "LDGSTS", "REDG", "RED", "ATOMG"):
            return 0
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 4)

    @property
    def target(self) -> int | None:
        """Of a branch. The ways of diverged warps through a synchronisation (BRA.DIV) are not followed.

        A CALL under a predicate is how the assembler leaves a loop (the next instruction jumps back): it never returns.
        """
        branches = self.name == "BRA" and ".DIV" not in self.opcode or self.name == "CALL" and self.guard
        if not branches:
            return None
        return int(re.findall(r"0x([0-9a-f]+)", self.operands)[-1], 16)

    @property
    def ends_block(self) -> bool:
        return self.target is not None or self.name == "EXIT" or not self.falls_through

    @property
    def falls_through(self) -> bool:
        if self.guard or self.name not in ("BRA", "EXIT", "RET", "BRX", "JMP", "JMX"):
            return True
        return "," in self.operands or self.name == "BRA" and self.target is None  # BRA P0, 0x..: a condition


def functions(text: str) -> dict[str, list[Instruction]]:
    """By (mangled) name, from what `cuobjdump -sass` prints."""
    found = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = [Instruction(int(a, 16), g, o, x.strip()) for a, g, o, x in _LINE.findall(body)]
    return found


# ---- loops ----------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    code: list[Instruction]
    after: list[int]  # addresses of the blocks that may follow; none after an exit

    def count(self, name: str) -> int:
        return sum(i.opcode.startswith(name) for i in self.code)


def blocks(code: list[Instruction]) -> dict[int, Block]:
    """Basic blocks by address, in order; only those that can be reached from the first one."""
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    starts |= {b.address for a, b in itertools.pairwise(code) if a.ends_block}
    cut: dict[int, list[Instruction]] = {}
    for i in code:
        if i.address in starts:
            current = cut.setdefault(i.address, [])
        current.append(i)
    order = list(cut)
    every = {}
    for at, following in zip(order, [*order[1:], None], strict=True):
        last = cut[at][-1]
        after = [] if last.target is None else [last.target]
        if last.falls_through and following is not None and following not in after:
            after.append(following)
        every[at] = Block(cut[at], after)
    reached, waiting = set(), [order[0]]
    while waiting:
        at = waiting.pop()
        if at not in reached:
            reached.add(at)
            waiting += every[at].after
    return {at: every[at] for at in order if at in reached}


@dataclass
class Loop:
    """`header` None: the whole kernel. `ends`: blocks that jump back to the header."""

    header: int | None
    body: set[int]
    ends: set[int]
    inner: list[Loop] = field(default_factory=list)

    def depth(self) -> int:
        return 1 + max((loop.depth() for loop in self.inner), default=0)


def nest(all_blocks: dict[int, Block]) -> Loop:
    """The kernel with its natural loops, each in the smallest one that holds it."""
    before: dict[int, set[int]] = {at: set() for at in all_blocks}
    for at, block in all_blocks.items():
        for following in block.after:
            before[following].add(at)
    loops: dict[int, Loop] = {}
    for end, header in _back_edges(all_blocks):
        body, waiting = {header}, [end]
        while waiting:
            at = waiting.pop()
            if at not in body:
                body.add(at)
                waiting += before[at]
        loop = loops.setdefault(header, Loop(header, set(), set()))
        loop.body |= body
        loop.ends.add(end)
    exits = {at for at, block in all_blocks.items() if block.code[-1].name == "EXIT"}
    whole = Loop(None, set(all_blocks), exits)
    outer = [whole]
    for loop in sorted(loops.values(), key=lambda loop: -len(loop.body)):
        min((o for o in outer if loop.body <= o.body), key=lambda o: len(o.body)).inner.append(loop)
        outer.append(loop)
    return whole


def _back_edges(all_blocks: dict[int, Block]) -> list[tuple[int, int]]:
    first = next(iter(all_blocks))
    found, seen, on_path, stack = [], {first}, {first}, [(first, iter(all_blocks[first].after))]
    while stack:
        at, following = stack[-1]
        to = next(following, None)
        if to is None:
            stack.pop()
            on_path.remove(at)
        elif to in on_path:
            found.append((at, to))
        elif to not in seen:
            seen.add(to)
            on_path.add(to)
            stack.append((to, iter(all_blocks[to].after)))
    return found


def hot_chain(whole: Loop, all_blocks: dict[int, Block]) -> list[Loop]:
    """From the outermost loop to the innermost one with the most exponentials (without any: the most instructions)."""

    def weight(loop: Loop) -> tuple[int, int]:
        body = [all_blocks[at] for at in loop.body]
        return sum(b.count("MUFU.EX2") for b in body), sum(len(b.code) for b in body)

    chains = [[loop] for loop in whole.inner]
    innermost = []
    while chains:
        chain = chains.pop()
        inner = [loop for loop in chain[-1].inner if weight(loop)[0] or not weight(chain[-1])[0]]
        chains += [[*chain, loop] for loop in inner]
        if not inner:
            innermost.append(chain)
    return max(innermost, key=lambda chain: weight(chain[-1]), default=[])


# ---- paths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Exponentials and bytes of global memory loaded, per thread and turn, where the most is not what is meant."""

    exponentials: int
    loaded: int


@dataclass(frozen=True)
class _Way:
    """Loops passed, exponentials, bytes of global memory per thread, instructions."""

    loops: int
    exponentials: int
    loaded: int
    stored: int
    code: tuple[Instruction, ...]

    def after(self, first: _Way) -> _Way:
        numbers = (getattr(self, n) + getattr(first, n) for n in ("loops", "exponentials", "loaded", "stored"))
        return _Way(*numbers, first.code + self.code)

    def rank(self) -> tuple[int, ...]:
        return self.loops, self.exponentials, self.loaded, self.stored, -len(self.code)


def turn(
    loop: Loop,
    all_blocks: dict[int, Block],
    chain: list[Loop],
    widest: int,
    path: Expected | None = None,
    beside: int = 1,
) -> list[Instruction]:
    """What a thread executes in one turn of `loop`: loops within it `beside` times, without those of `chain`.

    `widest`: bytes of an access to global memory. ValueError where there is no such path.
    """
    place = {at: at for at in loop.body}
    inner = {i.header: i for i in loop.inner}
    for i in loop.inner:
        place |= dict.fromkeys(i.body, i.header)
    start = next(iter(all_blocks)) if loop.header is None else loop.header
    ways: dict[int, dict[tuple, _Way]] = {}  # from a block or loop to the end, by what `path` asks for
    for at in _from_last(place[start], place, all_blocks, loop):
        if at in inner:
            once = () if any(inner[at] is c for c in chain) else turn(inner[at], all_blocks, chain, widest)
            mine = _Way(1, 0, 0, 0, tuple(once) * beside)
            onward = {(mine, place[to]) for b in inner[at].body for to in all_blocks[b].after if to in place}
            last = [mine] if inner[at].body & loop.ends else []
        else:
            block = all_blocks[at]
            through = {to: _through(block, to, widest) for to in block.after}
            onward = {(way, place[to]) for to, way in through.items() if to in place and way is not None}
            last = [_through(block, loop.header, widest)] if at in loop.ends else []
        found = [rest.after(way) for way, to in onward if to not in (at, loop.header) for rest in ways[to].values()]
        ways[at] = {}
        for way in (*found, *filter(None, last)):
            key = (way.exponentials, way.loaded) if path else ()
            if key not in ways[at] or way.rank() > ways[at][key].rank():
                ways[at][key] = way
    found = ways[place[start]]
    key = (path.exponentials, path.loaded) if path else ()
    if key not in found:
        wanted = f"with {path.exponentials} exponentials and {path.loaded} bytes loaded" if path else "without a call"
        raise ValueError(f"the loop at {start:#x} has no path {wanted}, only {sorted(found)}")
    return list(found[key].code)


def _through(block: Block, to: int | None, widest: int) -> _Way | None:
    """What is executed before `to` follows (None: the exit); None where a call or a too wide access is among it.

    Memory accesses under the predicate of the branch belong to one of its two ways.
    """
    branch = block.code[-1]
    condition = branch.guard if branch.ends_block else ""
    taken, not_taken = (condition, None) if to == branch.target else (None, condition)
    loaded = stored = 0
    for i in block.code:
        opposite = i.guard[1:] if i.guard.startswith("!") else f"!{i.guard}"
        if i.guard and (opposite == taken or i.guard == not_taken):
            continue  # not executed
        if i.name == "CALL" and not i.guard:
            return None
        if i.bytes > max(widest, 4):
            if not i.guard or i.guard == taken or opposite == not_taken:
                return None
        elif i.name in ("LDG", "LDGSTS"):
            loaded += i.bytes
        else:
            stored += i.bytes
    return _Way(0, block.count("MUFU.EX2"), loaded, stored, tuple(block.code))


def _from_last(start: int, place: dict[int, int], all_blocks: dict[int, Block], loop: Loop) -> list[int]:
    """Blocks and loops of `loop` such that each comes after all that may follow it."""
    after: dict[int, set[int]] = {}
    for at in loop.body:
        after.setdefault(place[at], set()).update(place[to] for to in all_blocks[at].after if to in place)
    order, seen, stack = [], {start}, [(start, iter(after[start] - {loop.header}))]
    while stack:
        at, following = stack[-1]
        to = next(following, None)
        if to is None:
            order.append(stack.pop()[0])
        elif to not in seen:
            seen.add(to)
            stack.append((to, iter(after[to] - {loop.header})))
    return order


def executed(
    code: list[Instruction],
    trips: tuple[int, ...],
    widest: int = 32,
    tile: Expected | None = None,
    beside: int = 1,
) -> tuple[Counter, Counter]:
    """(of the innermost hot loop, of everything): how often a thread executes instructions, by (class, name).

    `trips`: turns of the loops around and including the hot one, the outermost first; what the compiler has unrolled
    may lack at the end. `tile`: the path through the outermost. `widest`, `beside`: as in `turn`.
    """
    all_blocks = blocks(code)
    whole = nest(all_blocks)
    chain = hot_chain(whole, all_blocks)[-len(trips) :] if trips else []
    if trips and not chain:
        raise ValueError(f"no loop of {trips} turns is left in the code")
    total: Counter = Counter()
    turns = 1
    for level, loop in enumerate([whole, *chain]):
        turns *= trips[level - 1] if level else 1
        once = turn(loop, all_blocks, chain, widest, tile if level == 1 else None, beside)
        counted = Counter({key: n * turns for key, n in Counter((i.kind, i.name) for i in once).items()})
        total += counted
    return counted, total
