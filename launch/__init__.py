"""Scripts people run. The .sh files are the commands; the .py files are what they run."""
