"""What goes over the wire between agents, runner and monitor: beats and commands. Plain dataclasses, standard library only."""
