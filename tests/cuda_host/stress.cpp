// Runs the kernels through many calls, for a sanitizer to watch, and through some with a fault.
//
//   stress every N               every Nth of all calls; all results have to be finite
//   stress FAULT [FILE:LINE]     a call without and with a fault, at a barrier: 3 if the results
//                                differ
//   stress reach                 a line "FILE:LINE case" for every barrier that a case meets
//   stress missing FILE:LINE/CASE,CASE...   each of these cases with and then without this barrier,
//                                until that is noticed: a line "FILE:LINE case status", which is
//                                "whole" if it is noticed with the barrier, 0 if not even without
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <sstream>
#include <string>

#include "stress_calls.h"

namespace {

using namespace stress;

constexpr Variant kVariants[] = {
    {1, 0, false, false, kNoBudget, Precision::ieee},
    {1, 0, true, true, kNoBudget, Precision::tf32x3},
    {2, 0, true, false, 1, Precision::ieee},
    {1, 43, true, false, kNoBudget, Precision::ieee},
    {2, 43, false, true, 1, Precision::tf32x3},
};

constexpr int kDiffers = 3;

int run_every(int step) {
  int call = 0, runs = 0;
  for (const Variant& variant : kVariants) {
    for (int pair = 0; pair <= static_cast<int>(PairFunction::power); ++pair) {
      for (int kind = 0; kind <= static_cast<int>(Normalization::max_detached); ++kind) {
        for (int loss = 0; loss <= static_cast<int>(Loss::cross_entropy); ++loss) {
          const auto normalization = static_cast<Normalization>(kind);
          const bool entropy = static_cast<Loss>(loss) == Loss::cross_entropy;
          // what is centered has entries below 0, and a logarithm wants none
          const bool logarithm = static_cast<Loss>(loss) >= Loss::kl_forward;
          if ((entropy && normalization != Normalization::softmax) ||
              (logarithm && normalization == Normalization::frobenius_centered) ||
              call++ % step != 0) {
            continue;
          }
          const Settings settings =
              settings_of(static_cast<PairFunction>(pair), normalization, static_cast<Loss>(loss));
          if (!run(settings, variant).finite()) {
            std::fprintf(stderr, "not finite: pair function %d, normalization %d, loss %d\n", pair,
                         kind, loss);
            return kDiffers;
          }
          ++runs;
        }
      }
    }
  }
  std::printf("%d calls\n", runs);
  return 0;
}

// FILE:LINE
host::Site site_of(const std::string& text) {
  const size_t colon = text.find(':');
  return {text.substr(0, colon), std::atoi(text.c_str() + colon + 1)};
}

int run_with_fault(const std::string& name, const std::string& site) {
  const char* names[] = {"none",         "missing_barrier", "divergent_barrier",
                         "short_memory", "missing_wait",    "missing_boundary"};
  const Result right = run_case(0);
  for (int kind = 0; kind < 6; ++kind) {
    if (name == names[kind]) {
      host::fault = static_cast<host::Fault>(kind);
      host::fault_site = site_of(site);
      return run_case(0) == right ? 0 : kDiffers;
    }
  }
  std::fprintf(stderr, "unknown fault %s\n", name.c_str());
  return 2;
}

int tell_what_is_met() {
  for (int number = 0; number < kCases; ++number) {
    std::set<host::Site> met;
    host::met = &met;
    run_case(number);
    for (const host::Site& site : met) {
      std::printf("%s:%d %d\n", site.file.c_str(), site.line, number);
    }
  }
  return 0;
}

// In a process of its own, which a sanitizer ends. This one must not have run anything before:
// ThreadSanitizer stops watching where a process with more than one fiber forks.
std::string status_without(const host::Site& site, int number) {
  std::fflush(nullptr);
  int ends[2];
  if (pipe(ends) != 0) {
    return "no pipe";
  }
  const pid_t child = fork();
  if (child == 0) {
    const Result right = run_case(number);
    host::fault = host::Fault::missing_barrier;
    host::fault_site = site;
    _exit(write(ends[1], "", 1) == 1 && run_case(number) == right ? 0 : kDiffers);
  }
  close(ends[1]);
  char mark;
  const bool right = read(ends[0], &mark, 1) == 1;
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return !right              ? "whole"
         : WIFEXITED(status) ? std::to_string(WEXITSTATUS(status))
                             : "signal " + std::to_string(WTERMSIG(status));
}

int run_without(int count, char** requests) {
  for (int at = 0; at < count; ++at) {
    const std::string request = requests[at];
    const size_t slash = request.find('/');
    const std::string site = request.substr(0, slash);
    std::istringstream cases(request.substr(slash + 1));
    int number = 0;
    std::string status = "0";
    while (status == "0" && cases >> number) {
      status = status_without(site_of(site), number);
      cases.ignore();
    }
    std::printf("%s %d %s\n", site.c_str(), number, status.c_str());
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string command = count > 1 ? arguments[1] : "";
  if (command == "reach") {
    return tell_what_is_met();
  }
  if (command == "missing") {
    return run_without(count - 2, arguments + 2);
  }
  if (command == "every" && count == 3) {
    return run_every(std::atoi(arguments[2]));
  }
  if (count == 2 || count == 3) {
    return run_with_fault(command, count == 3 ? arguments[2] : "");
  }
  std::fprintf(stderr, "usage: stress every N|reach|missing SITE/CASES...|FAULT [SITE]\n");
  return 2;
}
