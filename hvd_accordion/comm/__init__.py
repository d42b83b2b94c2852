"""Communication between ranks: collectives and their names, agreement, how ranks start, ranks simulated in one process."""
