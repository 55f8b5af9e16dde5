/* An input/output error, as a dying disk gives it: loaded before libc, it makes
   the system call that the link FAULTS_TRIGGER points to by name fail with EIO,
   where it is about a path that contains /checkpoints/. Without that link all
   calls are as they were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int is_broken(const char *call, const char *path) {
  char name[64];
  const char *trigger = getenv("FAULTS_TRIGGER");
  int before = errno, broken = 0;
  ssize_t n;
  if (trigger && strstr(path, "/checkpoints/") &&
      (n = readlink(trigger, name, sizeof name - 1)) > 0) {
    name[n] = 0;
    broken = !strcmp(name, call);
  }
  errno = broken ? EIO : before;
  return broken;
}

static int is_broken_file(const char *call, int file) {
  char link[64], path[4096];
  int before = errno;
  ssize_t n;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  n = readlink(link, path, sizeof path - 1);
  errno = before;
  if (n <= 0) return 0;
  path[n] = 0;
  return is_broken(call, path);
}

#define WRAP(type, name, parameters, arguments, broken) \
  type name parameters {                                \
    static type(*real) parameters;                      \
    if (!real) real = dlsym(RTLD_NEXT, #name);          \
    return broken ? (type)-1 : real arguments;          \
  }

WRAP(ssize_t, write, (int f, const void *b, size_t n), (f, b, n),
     is_broken_file("write", f))
WRAP(ssize_t, writev, (int f, const struct iovec *v, int n), (f, v, n),
     is_broken_file("write", f))
WRAP(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), (f, b, n, o),
     is_broken_file("write", f))
WRAP(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o),
     (f, b, n, o), is_broken_file("write", f))
WRAP(int, fsync, (int f), (f), is_broken_file("fsync", f))
WRAP(int, fdatasync, (int f), (f), is_broken_file("fsync", f))
WRAP(int, rename, (const char *a, const char *b), (a, b),
     is_broken("rename", a))
WRAP(int, renameat, (int c, const char *a, int d, const char *b), (c, a, d, b),
     is_broken("rename", a))
WRAP(int, mkdir, (const char *p, mode_t m), (p, m), is_broken("mkdir", p))
