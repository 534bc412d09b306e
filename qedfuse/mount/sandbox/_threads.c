/* Gives up rights in all threads of the process.
 *
 * Landlock, no_new_privs and capabilities belong to a thread, and a thread can restrict only itself.
 * So each thread gets a signal, and the handler of the signal restricts the thread in which it runs.
 * The C library does the same for setuid(2).  The handler makes system calls only, so it can safely
 * interrupt any code.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dirent.h>
#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446
#endif

#define PAUSE_NANOSECONDS 200000L /* between two checks whether all threads have run the handler */
#define MAX_PAUSES 25000          /* five seconds */

/* A descriptor of the Landlock ruleset that restricts the threads, or -1; and the capabilities that
 * the threads keep, one bit each.  Set before the first signal. */
static int ruleset = -1;
static uint64_t kept;
/* The errno of the first thread that has failed. */
static atomic_int failure;
/* The number of signals whose handler has not returned. */
static atomic_int waiting;

/* Give up the rights of the calling thread; return 0, or an errno. */
static int restrict_thread(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct sets[2] = {{0}};

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
        return errno;
    if (ruleset >= 0 && syscall(SYS_landlock_restrict_self, ruleset, 0) != 0)
        return errno;
    if (syscall(SYS_capget, &header, sets) != 0)
        return errno;
    for (int at = 0; at < 2; at++) {
        sets[at].permitted &= (uint32_t)(kept >> (32 * at));
        sets[at].effective &= sets[at].permitted;
        sets[at].inheritable = 0;
    }
    return syscall(SYS_capset, &header, sets) != 0 ? errno : 0;
}

static void on_signal(int signal_number)
{
    int before = errno, failed = restrict_thread(), none = 0;

    (void)signal_number;
    if (failed)
        atomic_compare_exchange_strong(&failure, &none, failed);
    atomic_fetch_sub(&waiting, 1);
    errno = before;
}

/* Returns whether a thread is among those that have got the signal. */
static int is_done(const pid_t *done, size_t count, pid_t thread)
{
    for (size_t at = 0; at < count; at++)
        if (done[at] == thread)
            return 1;
    return 0;
}

/* Wait until all handlers have returned; return 0, the errno of the first thread that has failed, or
 * ETIMEDOUT. */
static int wait_for_handlers(void)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NANOSECONDS};

    for (int pauses = 0; atomic_load(&waiting) > 0; pauses++) {
        if (pauses == MAX_PAUSES)
            return ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    return atomic_load(&failure);
}

/* Send the signal to all other threads, and list the threads again until the list has no new one.
 * Return 0, or an errno.  `*threads` becomes the number of threads that were found, including this
 * one. */
static int restrict_others(DIR *tasks, int signal_number, size_t *threads)
{
    pid_t own = (pid_t)syscall(SYS_gettid), *done = NULL, *larger;
    size_t count = 0, before;
    struct dirent *entry;
    int failed = 0;

    do {
        before = count;
        rewinddir(tasks);
        while (!failed && (entry = readdir(tasks)) != NULL) {
            pid_t thread = (pid_t)atoi(entry->d_name); /* 0 for "." and ".." */

            if (thread <= 0 || thread == own || is_done(done, count, thread))
                continue;
            larger = realloc(done, (count + 1) * sizeof *done);
            if (larger == NULL) {
                failed = ENOMEM;
                break;
            }
            done = larger;
            done[count++] = thread;
            atomic_fetch_add(&waiting, 1);
            if (syscall(SYS_tgkill, getpid(), thread, signal_number) != 0) {
                atomic_fetch_sub(&waiting, 1);
                failed = errno == ESRCH ? 0 : errno; /* the thread may have ended */
            }
        }
        if (!failed)
            failed = wait_for_handlers();
    } while (!failed && count > before);
    free(done);
    *threads = count + 1;
    return failed;
}

PyDoc_STRVAR(restrict_doc,
             "restrict_threads(ruleset, kept_capabilities, signal)\n--\n\n"
             "Restrict all threads by a Landlock ruleset, and drop all their capabilities\n"
             "except those in kept_capabilities, a bit mask.\n\n"
             "Return the number of threads.  The ruleset is a descriptor, or -1 for none.  The\n"
             "signal must be unused, and no thread may block it.  After an OSError some threads\n"
             "may be restricted, and some not.");

static PyObject *restrict_threads(PyObject *module, PyObject *arguments)
{
    int descriptor, signal_number, failed;
    unsigned long long capabilities;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART}, old;
    size_t threads = 0;
    DIR *tasks;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "iKi:restrict_threads", &descriptor, &capabilities,
                          &signal_number))
        return NULL;
    tasks = opendir("/proc/self/task");
    if (tasks == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    sigfillset(&action.sa_mask);
    if (sigaction(signal_number, &action, &old) != 0) {
        closedir(tasks);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    ruleset = descriptor;
    kept = capabilities;
    atomic_store(&failure, 0);
    atomic_store(&waiting, 0);
    /* This thread is the first one, so a thread that it starts is restricted from its beginning. */
    failed = restrict_thread();
    Py_BEGIN_ALLOW_THREADS;
    if (!failed)
        failed = restrict_others(tasks, signal_number, &threads);
    Py_END_ALLOW_THREADS;
    closedir(tasks);
    /* A signal that comes too late must not end the process. */
    if (failed != ETIMEDOUT)
        sigaction(signal_number, &old, NULL);
    if (failed) {
        errno = failed;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromSize_t(threads);
}

static PyMethodDef methods[] = {
    {"restrict_threads", restrict_threads, METH_VARARGS, restrict_doc},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_threads",
    .m_doc = "Giving up rights in all threads of the process.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__threads(void)
{
    return PyModule_Create(&definition);
}
