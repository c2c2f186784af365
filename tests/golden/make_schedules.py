"""Write tests/golden/schedules.json: `python tests/golden/make_schedules.py`. Other implementations compare with it."""

import json
from pathlib import Path
from typing import Any

from engines.errors import SanaError
from runtime.schedule import make_schedule

CASES: list[dict[str, Any]] = [
    *({"scheduler": name, "num_steps": steps} for name in ("flow_euler", "flow_dpm_solver", "scm") for steps in (1, 2, 3, 20)),
    *(
        {"scheduler": name, "num_steps": 9, "flow_shift": shift, "spacing": spacing}
        for name in ("flow_euler", "flow_dpm_solver")
        for shift in (1.0, 6.0)
        for spacing in ("linear", "exponential", "karras")
    ),
    {"scheduler": "flow_euler", "num_steps": 4, "timestep_scale": 0.001},
    {"scheduler": "flow_euler", "flow_shift": 1.0, "spacing": [1.0, 0.98, 0.95, 0.9, 0.82, 0.7, 0.5, 0.25]},
    {"scheduler": "flow_dpm_solver", "flow_shift": 1.0, "spacing": [1.0, 0.8, 0.5, 0.2]},
    {"scheduler": "scm", "spacing": [1.5, 1.0, 0.3]},
    {"scheduler": "scm", "num_steps": 2, "intermediate_timestep": None},
    {"scheduler": "scm", "num_steps": 4, "max_timestep": 1.4},
    # refused
    {"scheduler": "flow_eular", "num_steps": 20},
    {"scheduler": "flow_euler", "num_steps": 0},
    {"scheduler": "flow_euler", "num_steps": 1001},
    {"scheduler": "flow_euler"},
    {"scheduler": "flow_euler", "num_steps": 20, "flow_shift": 0.0},
    {"scheduler": "flow_euler", "num_steps": 20, "flow_shift": 1e9},
    {"scheduler": "flow_euler", "num_steps": 20, "timestep_scale": 0.0},
    {"scheduler": "flow_euler", "num_steps": 20, "spacing": "karas"},
    {"scheduler": "flow_euler", "num_steps": 3, "spacing": [1.0, 0.5]},
    {"scheduler": "flow_euler", "spacing": []},
    {"scheduler": "flow_euler", "spacing": [0.5, 0.9]},
    {"scheduler": "flow_euler", "spacing": [1.0, 0.0]},
    {"scheduler": "scm", "num_steps": 20, "spacing": "karras"},
    {"scheduler": "scm", "num_steps": 2, "intermediate_timestep": 1.6},
    {"scheduler": "scm", "num_steps": 20, "max_timestep": 2.0},
    {"scheduler": "scm", "spacing": [1.5, 1.0], "max_timestep": 1.5},
]


def golden() -> list[dict[str, Any]]:
    found = []
    for arguments in CASES:
        try:
            made = make_schedule(**arguments)
        except SanaError as error:
            found.append({"arguments": arguments, "error": [type(error).__name__, str(error)]})
        else:
            found.append({"arguments": arguments, "sigmas": made.sigmas.tolist(), "table": made.table.tolist()})
    return found


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in golden())
    Path(__file__).with_name("schedules.json").write_text(f"[\n{lines}\n]\n")
