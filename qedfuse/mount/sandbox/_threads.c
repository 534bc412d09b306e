/* Gives up rights in all threads of the process.
 *
 * Landlock, no_new_privs and capabilities belong to a thread, and a thread can restrict only
 * itself.  So each thread gets a signal, whose handler restricts it.  The handler makes system
 * calls only, so it can safely interrupt any code.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dirent.h>
#include <errno.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
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
#define PAUSES_PER_SEARCH 50      /* ten milliseconds between two searches for threads that ended */

enum state { PENDING, DONE, ENDED };

/* A thread to which the signal is sent. */
struct signalled {
    pid_t thread;
    atomic_int state; /* an enum state: PENDING until the handler has finished, or the thread has ended */
    struct signalled *next;
};

/* A descriptor of the Landlock ruleset that restricts the threads, or -1; and the capabilities that
 * the threads keep, one bit each.  Set before the first signal. */
static int ruleset = -1;
static uint64_t kept;
/* The errno of the first thread that has failed. */
static atomic_int failure;
/* The threads to which the signal is sent, the latest first.  A thread is added just before the
 * signal is sent to it.  No thread is removed while a handler may run, so a handler can walk the
 * list. */
static struct signalled *_Atomic signalled_threads;

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

static void on_signal(int signal_number, siginfo_t *information, void *context)
{
    int before = errno, failed, none = 0;
    pid_t own = (pid_t)syscall(SYS_gettid);
    struct signalled *item;

    (void)signal_number;
    (void)context;
    /* Ignore the same signal of another process.  If it made the state DONE, the list could be
     * freed, and the old action set again, before the signal of this process arrives. */
    if (information->si_code != SI_TKILL || information->si_pid != getpid())
        return;
    failed = restrict_thread();
    if (failed)
        atomic_compare_exchange_strong(&failure, &none, failed);
    for (item = atomic_load(&signalled_threads); item != NULL; item = item->next)
        if (item->thread == own && atomic_load(&item->state) == PENDING) {
            atomic_store(&item->state, DONE);
            break; /* from now on the list may be freed */
        }
    errno = before;
}

/* Returns whether a thread has ended, or will run no handler any more.
 *
 * A main thread that has ended still accepts signals until the process ends.  But it has no current
 * directory. */
static int has_ended(DIR *tasks, pid_t thread)
{
    char link[32], target[1];

    snprintf(link, sizeof link, "%d/cwd", (int)thread);
    return readlinkat(dirfd(tasks), link, target, sizeof target) < 0 && errno == ENOENT;
}

/* Returns whether a thread got the signal.  ENDED items do not count, because a new thread may have
 * the same number. */
static int is_signalled(pid_t thread)
{
    const struct signalled *item;

    for (item = atomic_load(&signalled_threads); item != NULL; item = item->next)
        if (item->thread == thread && atomic_load(&item->state) != ENDED)
            return 1;
    return 0;
}

/* Returns whether there is a thread whose handler has not finished. */
static int has_pending(void)
{
    struct signalled *item;

    for (item = atomic_load(&signalled_threads); item != NULL; item = item->next)
        if (atomic_load(&item->state) == PENDING)
            return 1;
    return 0;
}

/* Wait until no handler is pending; return 0, the errno of the first thread that has failed, or
 * ETIMEDOUT. */
static int wait_for_handlers(DIR *tasks)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NANOSECONDS};
    struct signalled *item;

    for (int pauses = 1; has_pending(); pauses++) {
        if (pauses == MAX_PAUSES)
            return ETIMEDOUT;
        nanosleep(&pause, NULL);
        if (pauses % PAUSES_PER_SEARCH != 0)
            continue;
        for (item = atomic_load(&signalled_threads); item != NULL; item = item->next)
            if (atomic_load(&item->state) == PENDING && has_ended(tasks, item->thread))
                atomic_store(&item->state, ENDED);
    }
    return atomic_load(&failure);
}

/* Send the signal to a thread, unless it has ended; return 0, or an errno. */
static int send_signal(DIR *tasks, pid_t thread, int signal_number)
{
    struct signalled *item;
    int failed;

    if (has_ended(tasks, thread))
        return 0;
    item = calloc(1, sizeof *item);
    if (item == NULL)
        return ENOMEM;
    item->thread = thread;
    item->next = atomic_load(&signalled_threads);
    atomic_store(&signalled_threads, item);
    if (syscall(SYS_tgkill, getpid(), thread, signal_number) == 0)
        return 0;
    failed = errno;
    atomic_store(&item->state, ENDED);
    return failed == ESRCH ? 0 : failed; /* ESRCH: the thread has ended */
}

/* Send the signal to all other threads, until a list of the threads has no new one.  Return 0, or
 * an errno.  `*threads` becomes the number of all threads.  If handlers take too long, they may
 * still run on return; then has_pending() returns 1. */
static int restrict_others(DIR *tasks, int signal_number, size_t *threads)
{
    pid_t own = (pid_t)syscall(SYS_gettid);
    size_t count = 0, before;
    struct dirent *entry;
    int failed = 0, waited;

    do {
        before = count;
        rewinddir(tasks);
        while (!failed && (entry = readdir(tasks)) != NULL) {
            pid_t thread = (pid_t)atoi(entry->d_name); /* 0 for "." and ".." */

            if (thread <= 0 || thread == own || is_signalled(thread))
                continue;
            failed = send_signal(tasks, thread, signal_number);
            count += is_signalled(thread);
        }
        waited = wait_for_handlers(tasks);
        if (!failed)
            failed = waited;
    } while (!failed && count > before);
    *threads = count + 1;
    return failed;
}

/* Forget the threads that got the signal.  The caller must ensure that no handler runs. */
static void forget_threads(void)
{
    struct signalled *item, *next;

    for (item = atomic_exchange(&signalled_threads, NULL); item != NULL; item = next) {
        next = item->next;
        free(item);
    }
}

PyDoc_STRVAR(restrict_doc,
             "restrict_threads(ruleset, kept_capabilities, signal)\n--\n\n"
             "Restrict all threads by a Landlock ruleset, and drop all their capabilities\n"
             "except those in kept_capabilities, a bit mask.\n\n"
             "Return the number of threads.  The ruleset is a descriptor, or -1 for none.  The\n"
             "caller must ensure that no other code uses the signal and no thread blocks it.\n"
             "After an OSError some threads can be restricted, and others not.  The errno is\n"
             "EAGAIN if too many signals are pending, and ETIMEDOUT if a thread has not reacted\n"
             "to the signal.  After a timeout that thread may still be restricted later, so\n"
             "further calls fail with EBUSY.");

static PyObject *restrict_threads(PyObject *module, PyObject *arguments)
{
    int descriptor, signal_number, failed;
    unsigned long long capabilities;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_RESTART | SA_SIGINFO}, old;
    size_t threads = 0;
    DIR *tasks;

    (void)module;
    if (!PyArg_ParseTuple(arguments, "iKi:restrict_threads", &descriptor, &capabilities,
                          &signal_number))
        return NULL;
    if (atomic_load(&signalled_threads) != NULL) {
        errno = EBUSY;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
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
    /* This thread is restricted first, so every thread that it starts later inherits the restriction. */
    failed = restrict_thread();
    Py_BEGIN_ALLOW_THREADS;
    if (!failed)
        failed = restrict_others(tasks, signal_number, &threads);
    Py_END_ALLOW_THREADS;
    closedir(tasks);
    /* If a handler has not finished, the new action stays set: the old action could end the process
     * when the signal is delivered late. */
    if (!has_pending()) {
        sigaction(signal_number, &old, NULL);
        forget_threads();
    }
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

/* The same number as in privileges.py, and raised together with it (util/extensions.py). */
#define INTERFACE 1

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_threads",
    .m_doc = "Giving up rights in all threads of the process.",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__threads(void)
{
    PyObject *module;

    module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "INTERFACE", INTERFACE))
        Py_CLEAR(module);
    return module;
}
