"""What every command stands on: errors, files, signals, the console, the command line, memory."""
