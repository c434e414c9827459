"""Tables of other libraries, columns, and pairs of text and target, as rows: mappings of column to value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerlens.exceptions import DataError

TEXT, LABEL = "text", "label"


def with_rows(data: Any) -> Any:
    """The rows of a table (pandas, polars, Arrow) or of ``(texts, targets)``; other data as they are.

    Raises:
        DataError: texts and targets differ in number.
    """
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):  # pandas
        return data.to_dict("records")
    if hasattr(data, "collect") and hasattr(data, "collect_schema"):  # polars, lazy
        data = data.collect()
    if hasattr(data, "to_dicts"):  # polars
        return data.to_dicts()
    if hasattr(data, "to_pylist") and hasattr(data, "column_names"):  # Arrow
        return data.to_pylist()
    if isinstance(data, (list, tuple)) and len(data) == 2 and all(_is_column(part) for part in data):
        texts, targets = data
        if isinstance(texts[0], str) and is_number(targets[0]):
            return rows_of_columns({TEXT: texts, LABEL: targets})
    return data


def rows_of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of columns by their names.

    Raises:
        DataError: the columns differ in length.
    """
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise DataError(f"data: the columns {', '.join(columns)} have different lengths: {sorted(lengths)}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def rows_of_pairs(data: Any) -> list[dict[str, Any]]:
    """Rows of pairs (text, target)."""
    return [{TEXT: data[index][0], LABEL: data[index][1]} for index in range(len(data))]


def is_pair(sample: Any) -> bool:
    """Whether this is (text, target) with a number as target; two texts may be any two."""
    return (
        isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], str) and is_number(sample[1])
    )


def refuse_texts(sample: Any) -> None:
    """Refuse several texts without names, of which none can be told from the other.

    Raises:
        DataError: ``sample`` is such.
    """
    if _starts_with_text(sample) and all(isinstance(part, str) for part in sample):
        raise DataError(
            f"data: a sample is {len(sample)} texts without names; give rows by columns, such as "
            "{'text': ..., 'label': ...}, {'prompt': ..., 'completion': ...} or {'anchor': ..., 'positive': ...}"
        )


def _starts_with_text(sample: Any) -> bool:
    return isinstance(sample, (tuple, list)) and len(sample) > 1 and isinstance(sample[0], str)


def is_number(value: Any) -> bool:
    """Whether it is one number of Python, NumPy or torch."""
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)


def _is_column(values: Any) -> bool:
    return (isinstance(values, Sequence) or hasattr(values, "iloc") or hasattr(values, "tolist")) and (
        not isinstance(values, (str, bytes)) and len(values) > 0
    )
