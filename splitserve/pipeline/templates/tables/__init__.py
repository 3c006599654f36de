"""From a CSV file to a served release: data, train, build, evaluate, register."""
