"""One update: model, loss, optimizer, schedule, averages, precision and processes, and the state of them all."""
