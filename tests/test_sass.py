"""benchmarks/sass.py: what it reads from machine code, on code of a few lines."""

from __future__ import annotations

import pytest

from benchmarks import sass


def kernel(*texts: str) -> sass.Kernel:
    """Instructions of 16 bytes, as cuobjdump prints them."""
    lines = [f"        /*{16 * i:04x}*/    {text} ;    /* 0x00 */" for i, text in enumerate(texts)]
    (found,) = sass.kernels("\t\tFunction : name\n\t.headerflags\n" + "\n".join(lines)).values()
    assert [one.text for one in found.code] == list(texts)
    return found


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR16], R24"
NESTED = kernel(
    "MOV R0, R1",  # 00
    "IADD3 R2, R2, 0x1, RZ",  # 10, the outer loop
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R4",  # 20, the inner loop: a wait ...
    "@!P0 BRA 0x20",
    PRODUCT,  # 40, ... and a product
    "@P1 BRA 0x20",
    "@P2 BRA 0x90",  # a wait that lies after the end, and jumps back into the loop
    "@P3 BRA 0x10",  # 70
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R4",  # 90
    "@!P0 BRA 0x90",
    "BRA 0x70",
    "BRA 0xc0",
)


def test_loops() -> None:
    places = sorted([one.address // 16 for one in loop] for loop in NESTED.loops)
    assert places == [[1, 2, 3, 4, 5, 6, 7, 9, 10, 11], [2, 3, 4, 5], [9, 10], [12]]
    assert [one.address for one in NESTED.innermost("HGMMA")] == [0x20, 0x30, 0x40, 0x50]
    assert NESTED.innermost("LDL") == []
    assert sass.count(NESTED.code, "HGMMA", "SYNCS") == 3


def test_a_jump_that_a_run_decides() -> None:
    with pytest.raises(ValueError, match="'BRX R2 -0x10' at 0x10 jumps to where only a run could say"):
        kernel("MOV R0, R1", "BRX R2 -0x10").loops  # noqa: B018


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("NOP", 0),
        ("@P0 IADD3 R3, R7, RZ, RZ", 8),
        (PRODUCT, 156),  # four of the first operand
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", 88),
        ("HGMMA.64x256x16.F16 R24, gdesc[UR16], RZ", 88),
        ("LDSM.16.MT88.4 R8, [R20+0x6000]", 21),
        ("LDSM.16.M88.4 R20, [R8]", 24),
        ("STSM.16.MT88.4 [R17+0x32800], R96", 100),
        ("LDG.E.128 R4, desc[UR4][R10.64]", 12),
        ("STG.E.64 desc[UR4][R2.64], R14", 16),
        ("IMAD.WIDE R10, R3, 0x4, R12", 14),
        ("R2UR UR200, R5", 6),
    ],
)
def test_registers(text: str, registers: int) -> None:
    assert sass.registers(kernel(text).code) == registers


def test_budgets() -> None:
    """What runs before the warpgroups part counts for none of them, what runs after they met for both."""
    found = kernel(
        "MOV R200, R200",
        "@P0 BRA 0x50",
        "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xa0",
        PRODUCT,
        "BRA 0x70",
        "USETMAXREG.DEALLOC.CTAPOOL 0x20",
        "MOV R9, R9",
        "MOV R19, R19",
        "EXIT",
    )
    assert found.budgets() == [(0xA0, 156), (0x20, 20)]


def test_comparison() -> None:
    first = kernel("MOV R3, R4", "IADD3 R3, R3, R5, RZ", "@P1 BRA 0x0").code
    again = kernel("NOP", "MOV R7, R1", "IADD3 R7, R7, R2, RZ", "@P0 BRA 0x10").code[1:]
    assert sass.compare(first, first) == "same"
    assert sass.compare(first, again) == "registers renamed"
    other_use = kernel("MOV R3, R4", "IADD3 R3, R4, R5, RZ", "@P1 BRA 0x0").code
    assert sass.compare(first, other_use) == "other order"
    assert sass.compare(first, [first[1], first[0], first[2]]) == "other order"
    assert sass.compare(first, first[:2]) == "different"
