"""What analyze/export.py writes and runs: graphs, ONNX files with their operators, other runtimes, int8."""
