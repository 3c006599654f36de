"""Connections that are used again."""

from __future__ import annotations

from splitserve.client.sockets import Pool


class Connection:
    def __init__(self, *, is_usable: bool = True) -> None:
        self.is_usable = is_usable
        self.is_closed = False

    def released(self) -> None:
        """Nothing is counted here."""

    def close(self) -> None:
        self.is_closed = True


def test_the_connection_that_became_idle_last_is_used_again_if_it_can_be() -> None:
    """Those that cannot are closed, and so are more than may be idle."""
    pool: Pool[Connection] = Pool(max_idle=2)
    made = [pool.add(Connection()) for _ in range(3)]
    for each in made:
        pool.release(each)
    made[1].is_usable = False

    taken = pool.take(), pool.take()

    assert taken == (made[0], None)
    assert [each.is_closed for each in made] == [False, True, True]


def test_a_connection_that_is_in_use_when_the_pool_is_closed_is_closed_after_its_call() -> None:
    """Otherwise nobody would close it."""
    pool: Pool[Connection] = Pool(max_idle=2)
    in_use, idle = pool.add(Connection()), pool.add(Connection())
    pool.release(idle)

    pool.close()
    closed_at_once = in_use.is_closed, idle.is_closed
    pool.release(in_use)

    assert closed_at_once == (False, True)
    assert in_use.is_closed


def test_an_abandoned_pool_has_closed_all() -> None:
    """In a forked child, also those that a thread of the parent was using."""
    pool: Pool[Connection] = Pool(max_idle=2)
    made = [pool.add(Connection()) for _ in range(2)]
    pool.release(made[0])

    pool.abandon()

    assert [each.is_closed for each in made] == [True, True]
    assert pool.take() is None
