{{- define "lazymesh.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* The name of the objects; short enough for what some of them append to it. */ -}}
{{- define "lazymesh.fullname" -}}
{{- $name := include "lazymesh.name" . -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- .Values.fullnameOverride | default $full | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "lazymesh.selector" -}}
app.kubernetes.io/name: {{ include "lazymesh.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lazymesh.labels" -}}
{{ include "lazymesh.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: lazymesh
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "lazymesh.image" -}}
{{- with .Values.image.digest -}}
{{- if $.Values.image.tag }}
{{- fail "image.tag, image.digest: give one of them and leave the other empty; a tag has no effect beside a digest" }}
{{- end -}}
{{ $.Values.image.repository }}@{{ . }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "lazymesh.account" -}}
{{ .Values.serviceAccount.name | default (include "lazymesh.fullname" .) }}
{{- end -}}

{{- /* What `lazymesh check` and other commands run in the pod need to know: they do not read the agent's file. */ -}}
{{- define "lazymesh.env" -}}
{{- if ne .Values.datapath "auto" }}
- {name: LAZYMESH_DATAPATH, value: {{ .Values.datapath }}}
{{- end }}
{{- if ne .Values.bpffs "/sys/fs/bpf" }}
- {name: LAZYMESH_BPFFS, value: {{ .Values.bpffs | quote }}}
{{- end }}
{{- if .Values.clustermesh.kvstoremeshSecret }}
- {name: LAZYMESH_REMOTE_CONFIG, value: /var/lib/lazymesh/kvstoremesh}
{{- end }}
{{- with .Values.interfaces }}
- {name: LAZYMESH_INTERFACE, value: {{ join " " . | quote }}}
{{- end }}
{{- end -}}

{{- /* What the container may do. */ -}}
{{- define "lazymesh.security" -}}
readOnlyRootFilesystem: true
{{- if .Values.privileged }}
privileged: true
{{- else }}
privileged: false
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
  add:
    {{- toYaml (concat .Values.capabilities.needed .Values.capabilities.extra | uniq) | nindent 4 }}
seccompProfile: {type: RuntimeDefault}
{{- if include "lazymesh.apparmor" . }}
# The runtimes' default profiles forbid writing below /sys/fs/bpf.
appArmorProfile: {type: Unconfined}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Whether the API has the field appArmorProfile; before it there was an annotation. */ -}}
{{- define "lazymesh.apparmor" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}yes{{ end -}}
{{- end -}}
