// liburing, as Swift sees it.
//
// liburing.h turns _GNU_SOURCE on, under which glibc lays fd_set's names out differently than in
// Swift's own C module, and the two would clash. Including a glibc header first settles the question
// for the whole file; the one type that liburing needs from there is then fetched by itself.
#pragma once
#include <features.h>
#include <sched.h>
#if defined(__GLIBC__)
#include <bits/cpu-set.h>
#endif
#include <liburing.h>
