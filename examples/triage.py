"""Train on what answers are worth: a score that has no gradient.

A message that goes to the wrong team is passed on, which costs a little. But asking customers to send goods back when
they only wanted to know where the parcel is costs the shop a parcel. So not all mistakes are equal:

    zo-mlx train --model demo/model --data examples/support --objective examples.triage:worth --adapter-path triage
    zo-mlx evaluate --model demo/model --data examples/support --objective examples.triage:worth --adapter-path triage

`make demo` makes `demo/model`. Run the commands from the directory that `examples` is in.
"""

from typing import Any

NEEDLESS_RETURN = -2.0


def worth(prompt: str, output: str, example: dict[str, Any]) -> float:
    """What it is worth to the shop to send a message to a team.

    Args:
        prompt: the message.
        output: the subject that the model finds likeliest.
        example: the line of the data file; its `completion` is the right subject.
    """
    if output == example["completion"]:
        return 1.0
    return NEEDLESS_RETURN if output == " product" else 0.0
