"""The caption job: plan → caption → publish → summarise.

One driver process that needs no GPU; whatever interrupts it, the same command goes on where it stopped.
"""

from __future__ import annotations

import logging
import sys

from framecap.console import print_anything
from framecap.errors import FramecapError, LockedError
from framecap.pipeline.binding import claim_input
from framecap.pipeline.exits import EXIT_CRASHED, EXIT_DONE, EXIT_FAILED, EXIT_WORK_LEFT, RUN_AGAIN_KINDS, exit_code_of
from framecap.pipeline.host import THIS_HOST, Host
from framecap.pipeline.job import Job, Resources, prepare
from framecap.pipeline.ledger import Ledger
from framecap.pipeline.lock import OutputLock
from framecap.pipeline.plan import Plan, describe, list_shards_to_do, make_chunks, make_plan, make_units, subtract
from framecap.pipeline.progress import Progress
from framecap.pipeline.publish import Publisher
from framecap.pipeline.ray_stream import RayStream, RecordStream
from framecap.pipeline.recover import take_up_fragments
from framecap.pipeline.settings import CaptionSettings
from framecap.pipeline.state import claim_state
from framecap.pipeline.stops import StopRun, Stops
from framecap.pipeline.summary import Summary, write_summary
from framecap.pipeline.sweep import prune, sweep_temporary_files
from framecap.scratch import sweep_scratch_folders
from framecap.shards import list_outputs
from framecap.storage import answers

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """The command line of ``jobs/caption_frames.py`` and ``framecap run``; returns the exit code.

    ``prog``: the command's name in ``--help``.
    """
    print_anything()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stream, code = RayStream(), EXIT_CRASHED
    try:
        code = run(CaptionSettings.from_command_line(argv, prog), stream=stream).exit_code
    except KeyboardInterrupt as error:  # the second Ctrl-C
        print("ended at once; what is finished is kept: run the same line again for the rest", file=sys.stderr)
        code = exit_code_of(error)
    except (FramecapError, OSError) as error:
        kind = "locked" if isinstance(error, LockedError) else "error"
        print(f"{kind}: {' '.join(str(error).split())}", file=sys.stderr)
        code = exit_code_of(error)
    finally:
        stream.end(code)
    return code


def run(settings: CaptionSettings, host: Host = THIS_HOST, stream: RecordStream | None = None) -> Summary:
    """Caption what is not captioned yet, with the records of ``stream`` (by default Ray's).

    Raises ``SettingsError``, ``CaptionerError`` or ``StorageError`` before anything is started or written,
    and ``LockedError`` if another run works on the same output.
    """
    stream = stream or RayStream()
    job = prepare(settings, host)
    if settings.dry_run:
        ledger = Ledger(job.state_uri, job.run_id, host)
        return _dry_run(job, _plan(job, ledger))
    with (
        OutputLock(job.lock_uri, job.run_id, settings.lock_expiry, host) as lock,
        Stops(settings.time_budget, host) as stops,
    ):
        sweep_scratch_folders()
        ledger = Ledger(job.state_uri, job.run_id, host)
        plan = _plan(job, ledger)
        for line in describe(plan):
            log.info("%s", line)
        summary = Summary.begin(job, plan)
        stops.watch(lock.check)
        resources = _start(job, plan, stream, stops, summary)
        claim_state(job.output_uri, job.state_uri)
        claim_input(job.source, job.output_uri, job.state_uri, settings.input_moved_from)
        job = job.sized_for(resources) if resources is not None else job
        publisher = Publisher(job.places, plan.todo, ledger, plan.later, host)
        failure: BaseException | None = None
        try:
            try:
                _caption_and_publish(job, stream, resources, plan, publisher, summary, stops)
            finally:
                publisher.finish()
                if not lock.lost:  # else the files of the other run are in these places
                    _tidy(job, plan, publisher, summary, ledger)
        except BaseException as error:
            failure = error
            summary.stopped = f"{type(error).__name__}: {str(error)[:500]}"
            raise
        finally:
            summary.end(publisher, _exit_code(settings, summary, publisher, failure))
            try:
                where = write_summary(job, summary)
            except OSError as error:  # the exit code says how the run ended, not how its report did
                where = f"without a summary: {error}"
            log.info("%s; %s", summary.closing(), where)
    return summary


def _start(job: Job, plan: Plan, stream: RecordStream, stops: Stops, summary: Summary) -> Resources | None:
    """Get ready to caption; None if there is nothing to caption, or a reason to stop came meanwhile."""
    if not any(shard.todo_rows for shard in plan.todo):
        return None
    try:
        resources = stream.start(job, stops)
    except StopRun as stop:
        summary.stopped = str(stop)
        log.warning("stopping: %s", stop)
        return None
    summary.notice = resources.notice
    return resources


def _tidy(job: Job, plan: Plan, publisher: Publisher, summary: Summary, ledger: Ledger) -> None:
    """Leave nothing but results, ledger and summaries; what a store refuses now is left to the next run."""
    try:
        publisher.sweep()
        if job.settings.prune:
            summary.pruned = prune(job, plan, ledger)
            publisher.forget(job.source.misses)
        ledger.compact()
        known = plan.marks.keys() | plan.outputs.keys() | ledger.entries.keys()
        sweep_temporary_files(job.output_uri, known)
        sweep_temporary_files(job.state_uri, known, is_state=True)
    except OSError as error:
        log.warning("OUT is not tidied up (%s); the next run does it", error)


def _plan(job: Job, ledger: Ledger) -> Plan:
    return make_plan(
        job.source,
        job.output_uri,
        list_outputs(job.output_uri, job.source.marks),
        ledger,
        job.fingerprint,
        job.columns,
        job.added,
        job.settings.retry_errors,
        job.settings.limit,
        job.host,
    )


def _dry_run(job: Job, plan: Plan) -> Summary:
    summary = Summary.begin(job, plan)
    for line in [*describe(plan), *list_shards_to_do(plan), summary.estimate(job)]:
        print(line)
    summary.exit_code = EXIT_FAILED if plan.failed else EXIT_DONE
    return summary


def _caption_and_publish(
    job: Job,
    stream: RecordStream,
    resources: Resources | None,
    plan: Plan,
    publisher: Publisher,
    summary: Summary,
    stops: Stops,
) -> None:
    summary.recovered_rows = take_up_fragments(plan, job.places.fragments, job.fingerprint, publisher, job.host)
    for shard in plan.todo:
        publisher.publish_if_complete(shard.shard)
    remaining = [(shard, subtract(shard.todo, publisher.covered(shard.shard))) for shard in plan.todo]
    total = sum(stop - start for _, ranges in remaining for start, stop in ranges)
    if not total or resources is None:
        return
    chunks = list(make_chunks(remaining, job.chunk_rows))
    units = make_units(chunks, max(1, min(8, len(chunks) // (8 * resources.actors))))
    counted: set[str] = set()
    with Progress(total, job.host) as progress:
        try:
            for record in stream.records(job, units, resources, stops):
                if record.fragment not in counted:  # else of a task that ran twice
                    summary.add(record)
                    progress.add(record)
                if record.fragment:
                    counted.add(record.fragment)
                for name, error in record.failed.items():
                    publisher.fail(name, error)
                if record.pieces:
                    publisher.add(record.pieces, record.fragment)
                publisher.collect()
                if summary.error_rate_exceeded(job.settings):
                    raise StopRun("more rows fail than --max-error-rate allows")
                _check_places(job, publisher)
        except StopRun as stop:
            summary.stopped = str(stop)
            log.warning("stopping: %s", stop)


def _check_places(job: Job, publisher: Publisher) -> None:
    """Raise ``StopRun`` when captions cannot be written any more, or a store does not answer: whatever else is
    captioned would be lost."""
    for error in publisher.done.failed.values():
        if error.kind == "no_space":
            raise StopRun(f"no space is left ({error.message}); free some, and run the same command again")
        if error.kind == "unavailable":
            for uri in (job.output_uri, job.state_uri, job.source.root):
                if not answers(uri):
                    raise StopRun(f"the store of {uri} does not answer; run the same command again")


def _exit_code(settings: CaptionSettings, summary: Summary, publisher: Publisher, failure: BaseException | None) -> int:
    """How the run ended; ``failure`` is what broke it off."""
    failed = [*summary.plan_failed.values(), *map(str, publisher.done.failed.values())]  # "kind: message"
    too_many = summary.error_rate_exceeded(settings)
    if failure is not None:
        return exit_code_of(failure)
    if (publisher.unfinished and not too_many) or any(text.partition(":")[0] in RUN_AGAIN_KINDS for text in failed):
        return EXIT_WORK_LEFT
    if failed or summary.error_rate_exceeded(settings, least_rows=1):
        return EXIT_FAILED
    return EXIT_DONE
