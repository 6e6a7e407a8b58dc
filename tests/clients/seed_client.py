"""A client as any Python program would write it: starts jobs by name, asks, cancels, and reads failures.

Usage: seed_client.py ADDRESS TASK_QUEUE. Prints a line for each check; the last one is `all checks passed`.
"""

import asyncio
import sys
import uuid

from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError

REQUEST = {
    "prompt": "a cute kitten playing in a garden",
    "style": "realistic",
    "job_type": "VIDEO",
    "width": 512,
    "height": 512,
    "duration": 5.0,
    "user_id": "python",
    "metadata": {},
}
STEPS = {"IMAGE", "VIDEO", "PROCESSING", "COMPLETED", "FAILED"}
STATES = {"PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "RETRYING"}


def check(truth, what):
    if not truth:
        raise AssertionError(what)
    print("ok:", what, flush=True)


async def start(client, queue, args):
    return await client.start_workflow("GenVideoWorkflow", args=args, id=f"py-{uuid.uuid4()}", task_queue=queue)


def check_progress(progress):
    check(progress["step"] in STEPS, f"step {progress['step']}")
    check(progress["status"] in STATES, f"status {progress['status']}")
    check(0 <= progress["percent"] <= 100, f"percent {progress['percent']}")


async def runs_to_its_result(client, queue):
    handle = await start(client, queue, [REQUEST])
    check_progress(await handle.query("get_status"))
    result = await handle.result()
    check(result["status"] == "COMPLETED" and result["percent"] == 100, "completed at 100 percent")
    check(result["asset_url"].startswith("file://"), "has an asset")
    check(result["assets"]["video"]["media_type"] == "video/mp4", "has a video")
    check(result["done"]["delivered_size"] == [512, 512], "has the asked size")
    check(abs(result["done"]["duration"] - 5.0) <= 0.5 / result["done"]["fps"], "has the asked duration")
    check(result["metadata"] == {}, "carries the metadata")
    last = await handle.query("get_status")
    check(last["step"] == "COMPLETED" and last["asset_url"] == result["asset_url"], "tells the same afterwards")


async def cancels(client, queue):
    handle = await start(client, queue, [{**REQUEST, "steps": 150, "duration": 60.0}])
    while (await handle.query("get_status"))["percent"] <= 1:
        await asyncio.sleep(0.2)
    await handle.signal("cancel_generation")
    try:
        await handle.result()
        check(False, "a cancelled job has no result")
    except WorkflowFailureError as error:
        check(isinstance(error.cause, CancelledError), "ends as cancelled")
        check(error.cause.details[0]["status"] == "CANCELLED", "says so in its details")
    description = await handle.describe()
    check(description.status == WorkflowExecutionStatus.CANCELED, "is cancelled for the server")
    check((await handle.query("get_status"))["status"] == "CANCELLED", "is cancelled for the query")


async def is_refused(client, queue, name, args, classes):
    handle = await start(client, queue, args)
    try:
        await handle.result()
        check(False, f"{name}: refused")
    except WorkflowFailureError as error:
        cause = error.cause
        check(isinstance(cause, ApplicationError), f"{name}: an application error")
        check(cause.type in classes, f"{name}: {cause.type}: {cause.message}")
        check(cause.non_retryable, f"{name}: not retryable")
        check(cause.details[0][0]["class"] == cause.type, f"{name}: names the fault")


async def main(address, queue):
    client = await Client.connect(address)
    shape = {"INVALID_JSON", "WRONG_TYPE"}
    cases = [
        ("no argument", [], shape),
        ("two arguments", [REQUEST, REQUEST], shape),
        ("a string", ["a cute kitten"], shape),
        ("null", [None], shape),
        ("bytes", [b"\x00\x01"], shape),
        ("a wrong type", [{**REQUEST, "width": "512"}], {"WRONG_TYPE"}),
        ("a wrong list", [{**REQUEST, "duration": [5.0]}], {"WRONG_TYPE"}),
        ("out of range", [{**REQUEST, "width": 100000}], {"OUT_OF_RANGE"}),
        ("an unknown field", [{**REQUEST, "colour": "red"}], {"UNKNOWN_FIELD"}),
        ("an unknown style", [{**REQUEST, "style": "nonesuch"}], {"UNKNOWN_STYLE"}),
        ("a missing field", [{key: REQUEST[key] for key in REQUEST if key != "prompt"}], {"MISSING_FIELD"}),
    ]
    await asyncio.gather(*(is_refused(client, queue, *case) for case in cases))
    await runs_to_its_result(client, queue)
    await cancels(client, queue)
    print("all checks passed", flush=True)


asyncio.run(main(*sys.argv[1:]))
