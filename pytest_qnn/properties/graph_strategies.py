"""A Hypothesis strategy for small random QDQ graphs."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import strategies as st

from pytest_qnn.errors import OptionError
from pytest_qnn.properties.graphs import OPERATORS, QdqModel, Step
from pytest_qnn.settings import unknown_name

SHAPES = ((1, 4, 8, 8), (1, 3, 16, 16), (1, 3, 7, 9), (1, 1, 12, 12), (1, 16), (1, 6, 20))


def qdq_models(
    max_nodes: int = 6,
    operators: Collection[str] | None = None,
    activation: int | Collection[int] = (8, 16),
    weight: int | Collection[int] = (8, 4),
    shapes: Collection[tuple[int, ...]] = SHAPES,
) -> st.SearchStrategy[QdqModel]:
    """Descriptions of small graphs; ``model.save(folder)`` quantises one and writes it with its float original.

    Drawing costs next to nothing, saving a few tenths of a second: save what runs.

    Args:
        max_nodes: operators at most.
        operators: only these, by ONNX's names or "DepthwiseConv".
        activation: bits of activations: 8, 16 or both.
        weight: bits of weights: 8, 4 or both. 4-bit weights are per channel: QNN's HTP refuses others.
        shapes: of the input.

    Raises:
        OptionError: an unknown operator, or bit widths that QNN doesn't take.
    """
    for operator in operators or ():
        if operator not in OPERATORS:
            raise OptionError(f"operators: {unknown_name('operator', operator, OPERATORS)}")
    if max_nodes < 1:
        raise OptionError(f"max_nodes must be at least 1, got {max_nodes}")
    activations = _bits("activation", activation, (8, 16))
    weights = _bits("weight", weight, (8, 4))
    names = [name for name in OPERATORS if operators is None or name in operators]
    step = st.builds(Step, st.sampled_from(names), st.integers(0, 31), st.integers(0, 3))

    def build(
        shape: tuple[int, ...], steps: list[Step], activation: int, weight: int, per_channel: bool, seed: int
    ) -> QdqModel:
        channels = per_channel or weight == 4
        return QdqModel(shape, tuple(steps), activation, weight, channels, seed).effective

    return st.builds(
        build,
        st.sampled_from(list(shapes)),
        st.lists(step, min_size=1, max_size=max_nodes),
        st.sampled_from(activations),
        st.sampled_from(weights),
        st.booleans(),
        st.integers(0, 65535),
    )


def _bits(name: str, given: int | Collection[int], known: tuple[int, ...]) -> list[int]:
    chosen = [given] if isinstance(given, int) else list(given)
    for bits in chosen:
        if bits not in known:
            raise OptionError(f"{name}: {unknown_name('bit width', bits, map(str, known))}")
    if not chosen:
        raise OptionError(f"{name}: name at least one of {', '.join(map(str, known))}")
    return [bits for bits in known if bits in chosen]
