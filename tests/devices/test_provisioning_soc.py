"""Which SoC a device has, from what it tells: never a guess."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qnn.devices.soc import ALIASES, CHIP_IDS, OTHERS, PLATFORMS, SOCS, SocClues, identify


def test_every_table_leads_to_socs_that_the_runtime_knows() -> None:
    named = {*ALIASES.values(), *CHIP_IDS.values(), *(name for names in PLATFORMS.values() for name in names)}
    assert named - {OTHERS} <= SOCS.keys()


@pytest.mark.parametrize(
    ("clues", "soc"),
    [
        (SocClues(model="SM8650", machine="PINEAPPLE", chip_id=557, platform="pineapple"), "SM8650"),
        (SocClues(model="SM8635", platform="pineapple"), "SM8635"),
        (SocClues(model="SM8750P", platform="sun", chip_id=639), "SM8750"),
        (SocClues(model="SM8650-AC"), "SM8650"),
        (SocClues(model="SM7325", platform="lahaina", chip_id=475), "QCS6490"),
        (SocClues(model="SM8475", machine="TARO", chip_id=530, platform="taro"), "SM8475"),
        (SocClues(compatible=("qcom,qcs6490-rb3gen2", "qcom,qcm6490")), "QCS6490"),
        (SocClues(compatible=("maker,board", "qcom,qcs8550", "qcom,sm8550"), chip_id=603), "SM8550"),
        (SocClues(platform="kalama"), "SM8550"),
        (SocClues(chip_id=519), "SM8550"),
    ],
)
def test_clues_that_agree(clues: SocClues, soc: str) -> None:
    found, _ = identify(clues)
    assert found is SOCS[soc]


@pytest.mark.parametrize(
    ("clues", "note"),
    [
        (SocClues(), "tells nothing"),
        (SocClues(model="SM8735", platform="sun"), "SM8735"),  # the platform alone would say SM8750
        (SocClues(platform="sun"), "SM8750 or another chip"),
        (SocClues(platform="pineapple"), "SM8650, SM8635, SM7675 or another chip"),
        (SocClues(machine="TARO"), "SM8450, SM8475 or another chip"),
        (SocClues(chip_id=557, platform="kalama"), "contradicts itself"),
        (SocClues(model="SM8550", chip_id=557), "contradicts itself"),
        (SocClues(model="SM8735", chip_id=557), "contradicts itself"),
        (SocClues(chip_id=655, platform="kalama"), "655"),
        (SocClues(model="mt6989", platform="mt6989"), "mt6989"),
        (SocClues(compatible=("qcom,sm7450",)), "sm7450"),
    ],
)
def test_nothing_is_guessed(clues: SocClues, note: str) -> None:
    found, text = identify(clues)
    assert found is None
    assert note in text


def test_what_is_not_understood_is_told() -> None:
    assert identify(SocClues(model="Snapdragon 8 Gen 3", chip_id=557)) == (
        SOCS["SM8650"],
        "not understood: ro.soc.model Snapdragon 8 Gen 3",
    )


@given(
    model=st.text(max_size=20) | st.sampled_from([*SOCS, *ALIASES]),
    machine=st.text(max_size=20),
    chip_id=st.none() | st.integers() | st.sampled_from([*CHIP_IDS]),
    compatible=st.lists(st.text(max_size=20) | st.sampled_from([f"qcom,{name.lower()}" for name in SOCS]), max_size=4),
    platform=st.text(max_size=10) | st.sampled_from([*PLATFORMS]),
)
def test_a_soc_is_given_only_if_nothing_names_another(
    model: str, machine: str, chip_id: int | None, compatible: list[str], platform: str
) -> None:
    found, _ = identify(SocClues(model, machine, chip_id, tuple(compatible), platform))
    if found is None:
        return
    if chip_id in CHIP_IDS:
        assert CHIP_IDS[chip_id] == found.name
    if model in SOCS:
        assert model == found.name
    assert all(entry.removeprefix("qcom,").upper() == found.name for entry in compatible if entry[5:].upper() in SOCS)
    if platform in PLATFORMS:
        assert found.name in PLATFORMS[platform]
