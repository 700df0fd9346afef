"""Uniform registers that are read before they are written, in machine code made by hand."""

import pytest

from tests.gpu_without_gpu.sass_flow import uninitialised

HEAD = """
        /*0000*/                   UMOV UR4, 0x40 ;
        /*0010*/                   UIADD3 UR6, UP0, UR4, 0x2, URZ ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   ULDC.64 UR8, c[0x0][0x208] ;
"""
TAIL = """
.L_x_1:
        /*0040*/                   {} ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("LDG.E R2, desc[UR4][R2.64]", 5),
        ("UIADD3 UR8, UP0, UR8, 0x2, URZ", 8),  # the branch leaves it out
        ("STS [R2+UR6], R4", None),
        ("@P1 UIADD3.X UR6, UR9, URZ, URZ, UP0, !UPT", 9),
        ("UISETP.GE.AND UP0, UPT, UR6, UR4, UPT", None),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24", 5),
        ("HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24", 7),  # only the second is read
    ],
)
def test_what_a_branch_leaves_out_is_found(line, missing):
    found = uninitialised(HEAD + TAIL.format(line))
    if missing is None:
        assert found == []
    else:
        text = line.removeprefix("@P1 ")
        assert found == [f"{text}: UR{missing} may not be written"]


def test_both_ways_must_write():
    other = "\n.L_x_1:\n        /*0040*/                   ULDC.64 UR8, c[0x0][0x208] ;\n"
    code = HEAD + other + "        /*0050*/                   STS [R2+UR9], R4 ;\n"
    assert uninitialised(code) == []


def test_a_loop_is_followed_once():
    code = "\n.L_x_0:\n" + HEAD.replace("UR4, 0x40", "UR4, UR8").replace("_1", "_0")
    assert uninitialised(code) == ["UMOV UR4, UR8: UR8 may not be written"]


@pytest.mark.parametrize("left_out", [False, True])
def test_ways_that_meet_again(left_out):
    """Each way writes a register, and only where they meet is it read."""
    code = """
        /*0000*/                   BSSY B0, `(.L_x_2) ;
        /*0010*/               @P2 BRA `(.L_x_1) ;
        /*0020*/                   UMOV UR8, 0x1 ;
        /*0030*/                   BSYNC B0 ;
.L_x_1:
        /*0040*/                   UMOV UR8, 0x2 ;
        /*0050*/                   BSYNC B0 ;
.L_x_2:
        /*0060*/                   STS [R2+UR8], R4 ;
        /*0070*/                   EXIT ;
"""
    found = uninitialised(code.replace("UMOV UR8, 0x1", "NOP") if left_out else code)
    assert found == (["STS [R2+UR8], R4: UR8 may not be written"] if left_out else [])
