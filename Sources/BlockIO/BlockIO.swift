// Engines, threads, files, sockets, timers.
