"""Names of what a run leaves in its work directory."""

CONFIG, SUMMARY = "config.json", "summary.json"
TEACHER, CONTROL, STUDENT = "teacher.safetensors", "controlnet.safetensors", "student.safetensors"
REPORT, PREVIEWS = "report.html", "previews"
