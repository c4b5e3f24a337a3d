"""From a plan to what trains: flags, boundary, hooks, and the handle that users hold."""
