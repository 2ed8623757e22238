"""``simba env``."""

from __future__ import annotations

from simba.cli.loading import find_device
from simba.cli.options import Device, Json
from simba.cli.terminal import console
from simba.evaluate.store import check_writable, environment, write
from simba.ops import choose


def show_environment(device: Device = "auto", json_path: Json = None) -> None:
    """Show versions, the device, and the backend that pruning would run on.

    Example: `simba env`
    """
    if json_path is not None:
        check_writable(json_path)
    place = find_device(device)
    choice = choose("auto", place)
    content = {**environment(place), "backend": choice.backend, "because": choice.reason}
    for name, value in content.items():
        console.print(f"{name:>13}  {value}", markup=False, highlight=False)
    if json_path is not None:
        write(json_path, content)
