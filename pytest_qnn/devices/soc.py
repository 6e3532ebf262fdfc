"""The SoCs that Qualcomm's HTP runtime knows, and the Hexagon architecture of each.

Names and ids are those that the runtime itself recognizes (``soc_model`` of the QNN execution provider, QAIRT 2.51; ids as
it writes them into context binaries). A name that it doesn't know makes it fall back to a default with a mere log line,
so only these are let through. Architectures are those that the context binaries it makes for them tell.

How devices name them: chip ids are those of the Linux kernel's ``include/dt-bindings/arm/qcom,ids.h`` (mainline, and the
copies of it in the kernels that vendors publish, which name newer chips by platform) and, for 536, 614, 632, 642 and 643, of
the table in Qualcomm's published ``socinfo.c``. They are the kernel's numbers, in ``/sys/devices/soc0/soc_id``, and not those
of the QNN runtime (:attr:`Soc.soc_id`). Platforms are values of ``ro.board.platform`` and of ``compatible`` in devicetrees;
one platform often serves several chips.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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


# --- what devices call them -------------------------------------------------------------------------------------------

# Chips of one die with a chip of SOCS. QNN has one number for SM7325, QCM6490 and QCS6490; QCS8550 and QCM8550 declare
# themselves compatible with sm8550 in their devicetrees; Snapdragon X Elite is sold as X1E and called SC8380XP inside.
ALIASES = {
    "SM7325": "QCS6490",
    "SM7325P": "QCS6490",
    "SC7280": "QCS6490",
    "QCM6490": "QCS6490",
    "YUPIK": "QCS6490",
    "LAHAINA": "SM8350",
    "LAHAINAP": "SM8350",
    "WAIPIO": "SM8450",
    "WAIPIOP": "SM8450",
    "CAPE": "SM8475",
    "CAPEP": "SM8475",
    "KALAMA": "SM8550",
    "KALAMAP": "SM8550",
    "QCS8550": "SM8550",
    "QCM8550": "SM8550",
    "PINEAPPLE": "SM8650",
    "PINEAPPLEP": "SM8650",
    "CLIFFS": "SM8635",
    "CLIFFSP": "SM8635",
    "CLIFFS7": "SM7675",
    "CLIFFS7P": "SM7675",
    "X1E80100": "SC8380XP",
    "X1E78100": "SC8380XP",
    "SUN": "SM8750",
    "SUNP": "SM8750",
    "CANOE": "SM8850",
    "CANOEP": "SM8850",
}

CHIP_IDS = {
    415: "SM8350",
    439: "SM8350",
    457: "SM8450",
    475: "QCS6490",
    480: "SM8450",
    482: "SM8450",
    487: "QCS6490",
    497: "QCS6490",
    498: "QCS6490",
    499: "QCS6490",
    519: "SM8550",
    530: "SM8475",
    531: "SM8475",
    536: "SM8550",
    540: "SM8475",
    555: "SC8380XP",
    557: "SM8650",
    577: "SM8650",
    603: "SM8550",
    604: "SM8550",
    614: "SM8635",
    618: "SM8750",
    632: "SM7675",
    639: "SM8750",
    642: "SM8635",
    643: "SM7675",
    660: "SM8850",
    661: "SM8850",
}

OTHERS = ""  # a platform also serves chips that the runtime doesn't know
PLATFORMS = {
    "lahaina": ("SM8350", "QCS6490", OTHERS),
    "yupik": ("QCS6490",),
    "taro": ("SM8450", "SM8475", OTHERS),
    "kalama": ("SM8550",),
    "pineapple": ("SM8650", "SM8635", "SM7675", OTHERS),
    "cliffs": ("SM8635", "SM7675", OTHERS),
    "sun": ("SM8750", OTHERS),
    "canoe": ("SM8850", OTHERS),
}

_PART = re.compile(r"(SM|SC|QCS|QCM|SA|SXR|SDM|MSM|QRB|X\d[EP])\d{3,6}[A-Z]{0,2}")


@dataclass(frozen=True)
class SocClues:
    """What a device tells about its chip; empty where it doesn't.

    Attributes:
        model: ``ro.soc.model``, e.g. "SM8650".
        machine: ``/sys/devices/soc0/machine``, e.g. "SM8650" or "PINEAPPLE".
        chip_id: ``/sys/devices/soc0/soc_id``, the kernel's number, e.g. 557.
        compatible: of the devicetree's root, e.g. ("qcom,qcs6490-rb3gen2", "qcom,qcm6490").
        platform: ``ro.board.platform``, e.g. "pineapple".
    """

    model: str = ""
    machine: str = ""
    chip_id: int | None = None
    compatible: tuple[str, ...] = ()
    platform: str = ""


def named_soc(text: str) -> Soc | None:
    """The SoC that a device means by a name: its own, one of a speed grade ("SM8650-AC", "SM8750P"), a chip of the same die or
    the kernel's name; None if it isn't known."""
    name = text.strip().upper()
    for known in (name, re.sub(r"(?<=SM\d{4})(P|-[0-9A-Z]{1,3}(-[0-9A-Z]{1,3})?)$", "", name)):
        if known in SOCS:
            return SOCS[known]
        if known in ALIASES:
            return SOCS[ALIASES[known]]
    return None


def identify(clues: SocClues) -> tuple[Soc | None, str]:
    """The SoC that all clues agree on, and a note.

    Nothing is guessed: a part number that isn't known, clues that contradict each other, and a platform that serves several
    chips where nothing else is told, give None; the note then says what the device tells. With a SoC the note says what in
    the clues was not understood, or that the chip has another name; it is empty if there is nothing to say.
    """
    told: list[tuple[str, str, Soc | None]] = []  # where it stands, what it says, what that means
    if clues.model:
        told.append(("ro.soc.model", clues.model, named_soc(clues.model)))
    if clues.machine:
        told.append(("machine", clues.machine, named_soc(clues.machine)))
    if clues.chip_id is not None:
        name = CHIP_IDS.get(clues.chip_id)
        told.append(("soc_id", str(clues.chip_id), SOCS[name] if name else None))
    parts = [entry.removeprefix("qcom,") for entry in clues.compatible if entry.startswith("qcom,")]
    told += [("devicetree", part, soc) for part in parts if (soc := named_soc(part))]
    if not told:
        told += [("devicetree", part, None) for part in parts if _is_part(part)]
    described = [f"{where} {what}" for where, what, _ in told] + (
        [f"platform {clues.platform}"] if clues.platform else []
    )
    told = [clue for clue in told if clue[2] or clue[1].lower() not in PLATFORMS]
    platform = clues.platform or (clues.machine if clues.machine.lower() in PLATFORMS else "")
    served = PLATFORMS.get(platform.lower())
    found = _unique(soc for _, _, soc in told if soc)
    strangers = [f"{where} {what}" for where, what, soc in told if soc is None and _is_part(what)]
    if len(found) > 1 or (found and strangers) or (found and served and found[0].name not in served):
        return None, f"it contradicts itself: {', '.join(described)}"
    if found:
        return found[0], _remarks(found[0], told, platform if served is None else "")
    if told:
        return None, f"not among the known ones: {', '.join(described)}"
    if served is None:
        return None, f"not among the known ones: {', '.join(described)}" if described else "it tells nothing about it"
    if len(served) > 1:
        *names, last = [name or "another chip" for name in served]
        return None, f"platform {platform} may be {', '.join(names)} or {last}, and nothing else is told"
    return SOCS[served[0]], f"by its platform {platform} alone"


def _is_part(text: str) -> bool:
    return _PART.fullmatch(text.strip().upper()) is not None


def _unique(socs: Iterable[Soc]) -> list[Soc]:
    return list(dict.fromkeys(socs))


def _remarks(soc: Soc, told: list[tuple[str, str, Soc | None]], platform: str) -> str:
    unknown = [f"{where} {what}" for where, what, meant in told if meant is None]
    unknown += [f"platform {platform}"] if platform else []
    named = [what for where, what, meant in told if where == "ro.soc.model" and meant and meant.name != what.upper()]
    notes = [f"called {name}" for name in named] + ([f"not understood: {', '.join(unknown)}"] if unknown else [])
    return "; ".join(notes)
