"""Before any of the trainers is imported."""

from benchmarks.foreign_imports import allow_foreign_imports

allow_foreign_imports()
