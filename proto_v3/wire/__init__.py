"""What the two VMMs send each other: frames, channels, streams over connections. Imports notify, timeline, errors."""
