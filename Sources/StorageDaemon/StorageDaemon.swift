// The daemon: QMP commands over the graph.
