"""Names of the files of a run in its work directory."""

CONFIG, SUMMARY = "config.json", "summary.json"
TEACHER, CONTROL, STUDENT = "teacher.safetensors", "controlnet.safetensors", "student.safetensors"
METRICS, REPORT, PREVIEWS = "metrics.jsonl", "report.html", "previews"
PHASES, PAIRS = "phases.json", "pairs"
