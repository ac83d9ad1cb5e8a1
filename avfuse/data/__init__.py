"""Clips for audio-visual training: readers of video files with sound, and a data set that is generated."""
