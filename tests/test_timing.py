"""Times of candidates in turns. How long anything takes is nowhere asserted."""

import torch

from repvit_mm.deploy.timing import interleave

CPU = torch.device('cpu')


def test_turns_rotate_and_the_second_run_of_each_is_timed():
    now, ran = [0.0], []

    def candidate(name, durations):
        remaining = iter(durations)

        def run():
            ran.append(name)
            now[0] += next(remaining)

        return run

    # Two runs that do not count, then three turns of an untimed (9) and a timed run.
    candidates = {'a': candidate('a', [9, 9, 9, 1, 9, 5, 9, 3]), 'b': candidate('b', [9, 9, 9, 2, 9, 2, 9, 2])}
    measured = interleave(candidates, 3, CPU, clock=lambda: now[0])
    assert measured == {'a': (3, 2, 4), 'b': (2, 2, 2)}
    assert ''.join(ran) == 'bbaa' + 'aabb' + 'bbaa' + 'aabb'


def test_one_round():
    ticks = iter(range(100))
    assert interleave({'a': lambda: None}, 1, CPU, clock=lambda: next(ticks)) == {'a': (1, 1, 1)}
