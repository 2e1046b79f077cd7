"""Fragments of earlier runs: which of them count for this run, which for a later one, and which for none.

Captions cost GPU time, so a fragment is deleted only when it is known to be of no use.
"""

from __future__ import annotations

import logging

from framecap.errors import StoreUnavailableError
from framecap.pipeline.fragments import Fragment, delete_fragment, is_fragment_name, list_fragments, read_fragment
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.plan import Piece, Plan
from framecap.pipeline.publish import Publisher

log = logging.getLogger(__name__)
_READ_WAITS = (1.0, 5.0)  # seconds


def take_up_fragments(plan: Plan, folder: str, fingerprint: str, publisher: Publisher, host: Host = THIS_HOST) -> int:
    """Hand the fragments in ``folder`` to the publisher; returns the rows they hold that are to do now.

    Those of other runs are left alone: of shards that this run does not see (a narrower ``--input-uri``) or cannot
    read now, of other captioners or options as long as their shards are not captioned, and of ``--retry-errors``.
    Raises ``StoreUnavailableError``.
    """
    wanted = {shard.shard: shard for shard in plan.todo}
    uncaptioned = plan.uncaptioned()
    rows = 0
    for name in list_fragments(folder):
        try:
            fragment = _read_patiently(folder, name, host)
        except StoreUnavailableError:  # waited for already; its captions must not be made again
            raise
        except OSError as error:
            log.warning("fragment %s cannot be read (%s); its rows are captioned again", name, error)
            continue
        except Exception as error:  # cut short or damaged: its rows are captioned again
            log.debug("%s is no fragment: %s", name, error)
            if is_fragment_name(name):
                delete_fragment(folder, name)
            continue
        needed = {piece.shard for piece in fragment.pieces if may_serve(piece, plan, uncaptioned)}
        if not needed:
            delete_fragment(folder, name)
        elif fragment.fingerprint != fingerprint:
            publisher.keep(name, needed)
        else:
            serving = (p for p in fragment.pieces if p.shard in wanted and p.serves(wanted[p.shard]))
            rows += sum(piece.stop - piece.start for piece in serving)
            publisher.add(fragment.pieces, name, needed)
    if rows:
        log.info("%d rows are in fragments of earlier runs", rows)
    return rows


def _read_patiently(folder: str, name: str, host: Host) -> Fragment:
    """A fragment; a disk that stumbles is asked again."""
    for wait in _READ_WAITS:
        try:
            return read_fragment(folder, name)[0]
        except (StoreUnavailableError, FileNotFoundError):
            raise
        except OSError as error:
            log.warning("fragment %s cannot be read (%s); trying again in %.0f s", name, error, wait)
            host.sleep(wait)
    return read_fragment(folder, name)[0]


def may_serve(piece: Piece, plan: Plan, uncaptioned: set[str]) -> bool:
    """Whether the captions of ``piece`` may be of use to this run or another one."""
    if piece.shard not in plan.marks:  # not in this run's input; another's may hold it
        return True
    if piece.signature != plan.marks[piece.shard]:
        return False
    if piece.basis:  # rows that failed, taken up again; of use as long as the caption shard is the same
        return piece.basis == plan.outputs.get(piece.shard)
    return piece.shard in uncaptioned
