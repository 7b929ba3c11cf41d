"""Errors in one line."""

import pytest

from repvit_mm.messages import one_line


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (ValueError('something is\n  wrong with the file'), 'something is wrong with the file'),
        (KeyError('lr'), "KeyError: 'lr'"),
        (RuntimeError(), 'RuntimeError: '),
        (ValueError('many words ' * 20), 'many words many words many words many words many words many ...'),
    ],
)
def test_one_line(error, expected):
    assert one_line(error, longest=66) == expected
