// Validates custom resources: a JSON list of them on stdin, problems on stdout, one a line.
//
// The compiled validators of @kubernetes-models know types and formats, but let unknown fields
// pass. TypeScript knows the fields, so each resource is type-checked as a literal as well.

import { execFileSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const PACKAGES = {
  "keda.sh": "keda",
  "monitoring.coreos.com": "prometheus-operator",
};

const here = import.meta.dirname;
const resources = JSON.parse(readFileSync(0, "utf8"));
const sources = [];

for (const [number, resource] of resources.entries()) {
  const { apiVersion, kind, metadata } = resource;
  const [group] = apiVersion.split("/");
  if (!(group in PACKAGES)) {
    console.log(`${kind} ${metadata.name}: no schema of ${apiVersion} is known`);
    continue;
  }
  const module = `@kubernetes-models/${PACKAGES[group]}/${apiVersion}/${kind}`;
  const { [kind]: Model } = await import(module).catch(() => ({}));
  if (Model === undefined) {
    console.log(`${kind} ${metadata.name}: ${apiVersion} has no such kind`);
    continue;
  }
  try {
    new Model(resource).validate();
  } catch (error) {
    console.log(`${kind} ${metadata.name}: ${error.message}`);
  }
  sources.push(
    `import type { I${kind} as I${number} } from "${module}";`,
    `export const resource${number}: I${number} = ${JSON.stringify(resource)};`,
  );
}

const directory = mkdtempSync(join(here, "node_modules", ".checked-"));
try {
  writeFileSync(join(directory, "resources.ts"), sources.join("\n"));
  execFileSync(
    process.execPath,
    [
      join(here, "node_modules", "typescript", "bin", "tsc"),
      ...["--noEmit", "--strict", "--skipLibCheck", "--pretty", "false"],
      ...["--module", "nodenext", "--target", "es2022", join(directory, "resources.ts")],
    ],
    { cwd: directory, encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] },
  );
} catch (error) {
  console.log(error.stdout.trim());
} finally {
  rmSync(directory, { recursive: true });
}
