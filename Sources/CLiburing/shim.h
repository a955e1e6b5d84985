// What liburing and the kernel offer, as Swift sees it.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <liburing.h>
