"""What ranks say to each other: collectives, names, agreement, how ranks are started, ranks simulated in one process."""
