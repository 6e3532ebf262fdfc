"""The SoCs that Qualcomm's HTP runtime knows, and the Hexagon architecture of each.

Names and ids are those that the runtime itself recognizes (``soc_model`` of the QNN execution provider, QAIRT 2.51; ids as
it writes them into context binaries). A name that it doesn't know makes it fall back to a default with a mere log line,
so only these are let through. Architectures are those that the context binaries it makes for them tell.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_qnn.errors import OptionError


@dataclass(frozen=True)
class Soc:
    """A system on a chip.

    Attributes:
        name: as the runtime spells it.
        soc_id: Qualcomm's number for it.
        htp_arch: version of its Hexagon tensor processor, e.g. 75 for "v75".
    """

    name: str
    soc_id: int
    htp_arch: int


SOCS = {
    soc.name: soc
    for soc in (
        Soc("SM8350", 30, 68),
        Soc("QCS6490", 35, 68),
        Soc("SM8450", 36, 69),
        Soc("SM8475", 42, 69),
        Soc("SM8550", 43, 73),
        Soc("SM8650", 57, 75),
        Soc("SC8380XP", 60, 73),
        Soc("SM8635", 68, 73),
        Soc("SM8750", 69, 79),
        Soc("SM7675", 70, 73),
        Soc("SM8850", 87, 81),
        Soc("SC8480XP", 88, 81),
    )
}


def find_soc(name: str) -> Soc:
    """The SoC called ``name`` (case doesn't matter).

    Raises:
        OptionError: the runtime doesn't know it.
    """
    from pytest_qnn.settings import unknown_name

    soc = SOCS.get(name.strip().upper())
    if soc is None:
        raise OptionError(unknown_name("SoC", name, SOCS))
    return soc


def soc_of_arch(htp_arch: object) -> Soc:
    """The first SoC with a Hexagon architecture given as 75 or "v75".

    Raises:
        OptionError: no known SoC has it.
    """
    text = str(htp_arch).lower().removeprefix("v")
    for soc in SOCS.values():
        if str(soc.htp_arch) == text:
            return soc
    known = sorted({s.htp_arch for s in SOCS.values()})
    raise OptionError(f"unknown htp_arch {htp_arch!r}. Known: {', '.join(f'v{a}' for a in known)}")
