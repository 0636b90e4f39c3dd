"""Names of what a run leaves in its work directory."""

CONFIG, SUMMARY = "config.json", "summary.json"
TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
REPORT, STRIPS = "report.html", "strips"
