"""Machine code as cuobjdump prints it (SASS): its instructions, loops and registers."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +([^;]+?) *;")
_PREDICATE = re.compile(r"@!?U?P\w+ +")
_REGISTER = re.compile(r"\b(UR|UP|R|P|B|SB|gsb)(\d+)\b")
_TARGET = re.compile(r"\b0x[0-9a-f]+$")
_JUMPS_ELSEWHERE = ("BRX", "BRXU", "JMP", "JMX", "JMXU")


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # "@!P0 BRA 0x350"

    @functools.cached_property
    def opcode(self) -> str:
        """Its name with modifiers, such as HGMMA.64x128x16.F32.BF16."""
        return _PREDICATE.sub("", self.text, count=1).split(maxsplit=1)[0]

    @property
    def operands(self) -> list[str]:
        words = _PREDICATE.sub("", self.text, count=1).split(maxsplit=1)
        return words[1].split(", ") if len(words) > 1 else []


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel, in the order of their addresses; numbers are places among them."""

    code: list[Instruction]

    @functools.cached_property
    def successors(self) -> list[list[int]]:
        """Where each instruction may go on."""
        places = {instruction.address: place for place, instruction in enumerate(self.code)}
        found = []
        for place, one in enumerate(self.code):
            name, _, modifiers = one.opcode.partition(".")
            if name in _JUMPS_ELSEWHERE:
                raise ValueError(f"{one.text!r} at {one.address:#x} jumps to where only a run could say")
            predicated = one.text.startswith("@")
            target = _TARGET.search(one.text) if name in ("BRA", "CALL") else None
            always = name in ("EXIT", "RET") or (name == "BRA" and not modifiers and len(one.operands) == 1)
            after = [place + 1] if (predicated or not always) and place + 1 < len(self.code) else []
            found.append(after + ([places[int(target[0], 16)]] if target else []))
        return found

    def reachable(self, start: int) -> list[Instruction]:
        """What may run from an instruction on."""
        found, waiting = {start}, [start]
        while waiting:
            new = set(self.successors[waiting.pop()]) - found
            found |= new
            waiting += new
        return [self.code[place] for place in sorted(found)]

    @functools.cached_property
    def loops(self) -> list[list[Instruction]]:
        """The natural loops, each with its inner loops; loops of one head are one."""
        before: list[list[int]] = [[] for _ in self.code]
        ends: dict[int, list[int]] = {}  # by head, from where the loop goes back to it
        for place, targets in enumerate(self.successors):
            for target in targets:
                before[target].append(place)
                if target <= place:
                    ends.setdefault(target, []).append(place)
        found = []
        for head, backs in ends.items():
            body: set[int] = set()
            for back in backs:
                part, waiting = {head, back}, [back] if back != head else []
                while waiting:
                    new = set(before[waiting.pop()]) - part
                    part |= new
                    waiting += new
                # Where a path from the kernel's start avoids the head, the jump closes no loop.
                if head == 0 or 0 not in part:
                    body |= part
            if body:
                found.append([self.code[place] for place in sorted(body)])
        return found

    def loops_with(self, opcode: str) -> list[list[Instruction]]:
        return [loop for loop in self.loops if count(loop, opcode)]

    def innermost(self, opcode: str) -> list[Instruction]:
        """The loop that has an opcode most often, of those that have it and no smaller such loop inside."""
        having = [(loop, {one.address for one in loop}) for loop in self.loops_with(opcode)]
        inner = [loop for loop, places in having if not any(other < places for _, other in having)]
        return max(inner, key=lambda loop: (count(loop, opcode), len(loop)), default=[])

    def budgets(self) -> list[tuple[int, int]]:
        """The registers that each setmaxnreg grants and how many are touched from there on, largest first."""
        places = [place for place, one in enumerate(self.code) if one.opcode.startswith("USETMAXREG")]
        granted = [int(self.code[place].operands[-1], 16) for place in places]
        used = [registers(self.reachable(place)) for place in places]
        return sorted(zip(granted, used, strict=True), reverse=True)


def disassemble(cubin: str | Path, sass: bool = True) -> str:
    """What cuobjdump says: the resources of each kernel, and with ``sass`` its instructions."""
    import triton

    tool = Path(triton.knobs.nvidia.cuobjdump.path)
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}  # for nvdisasm
    command = [tool, "-res-usage", *(["-sass"] if sass else []), cubin]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[Instruction]:
    return [Instruction(int(address, 16), line) for address, line in _LINE.findall(text)]


def kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a disassembly by their mangled names."""
    parts = [part.split(maxsplit=1) for part in text.split("Function : ")[1:]]
    return {name: Kernel(instructions(code)) for name, code in parts}


def count(code: Iterable[Instruction], *opcodes: str) -> int:
    """How many instructions have an opcode that starts with one of these."""
    return sum(instruction.opcode.startswith(opcodes) for instruction in code)


def registers(code: Iterable[Instruction]) -> int:
    """How many general registers, counted from R0, the instructions touch."""
    return max((_registers(one.text) for one in code), default=0)


@functools.lru_cache(maxsize=1 << 17)
def _registers(text: str) -> int:
    """One more than the last register of an instruction, whose operands may be several registers each."""
    opcode, *rest = _PREDICATE.sub("", text, count=1).split(maxsplit=1)
    product = re.match(r"HGMMA\.64x(\d+)x\d+\.(F32|F16)", opcode)
    memory = re.search(r"\.(64|128)\b", opcode) if opcode.startswith(("LD", "ST", "ATOM")) else None
    matrices = re.match(r"(?:LDSM|STSM)\..*\.([24])$", opcode)
    found = 0
    for number, operand in enumerate(rest[0].split(", ") if rest else []):
        width = 1
        if product:
            sums = int(product[1]) // (2 if product[2] == "F32" else 4)
            width = 4 if number == 1 else sums  # the first operand, or what is added to
        elif matrices or memory:
            width = int(matrices[1]) if matrices else int(memory[1]) // 32
        elif ".WIDE" in opcode and number in (0, 3):
            width = 2
        for name, pair in re.findall(r"\bR(\d+)(\.64)?", operand):
            address = "[" in operand
            found = max(found, int(name) + (2 if pair else 1 if address else width))
    return found


def renamed(code: Collection[Instruction]) -> list[str]:
    """The texts with registers numbered in the order in which they appear, and addresses from the first."""
    names: dict[str, str] = {}
    numbers: dict[str, int] = {}

    def rename(found: re.Match[str]) -> str:
        if found[0] not in names:
            names[found[0]] = f"{found[1]}{numbers.setdefault(found[1], 0)}"
            numbers[found[1]] += 1
        return names[found[0]]

    first = min((one.address for one in code), default=0)
    texts = []
    for instruction in code:
        text = _REGISTER.sub(rename, instruction.text)
        if instruction.opcode.startswith(("BRA", "BSSY", "CALL")):
            text = _TARGET.sub(lambda target: hex(int(target[0], 16) - first), text)
        texts.append(text)
    return texts


def compare(code: Collection[Instruction], other: Collection[Instruction]) -> str:
    """How alike two machine codes are: same, registers renamed, same opcodes in another order, different."""
    if [one.text for one in code] == [one.text for one in other]:
        return "same"
    if renamed(code) == renamed(other):
        return "registers renamed"
    if sorted(one.opcode for one in code) == sorted(one.opcode for one in other):
        return "other order"
    return "different"
