"""What a model writes, and how good it is: generation, judged benchmarks, evaluation tasks."""
